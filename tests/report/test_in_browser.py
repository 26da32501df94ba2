"""The pages in a real Chromium: no console message, no sideways scrolling, sorting, light and dark."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pgsvd_vllm.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

# Clicks on the column `rank` twice, and leaves what the page looks like in its title.
PROBE = """<script>
const table = [...document.querySelectorAll("table[data-sort]")].pop();
const button = [...table.querySelectorAll("button")].find(b => b.textContent === "rank");
const ranks = () => [...table.tBodies[0].rows].map(r => r.cells[2].textContent).join(" ");
button.click(); const down = ranks();
button.click(); const up = ranks();
const wide = document.documentElement.scrollWidth - innerWidth;
const style = getComputedStyle(document.body);
document.title = [innerWidth, wide, style.backgroundColor, down, up].join("|");
</script>"""


def shown(page: Path, width: int, dark: bool, folder: Path) -> list[str]:
    """What the probe found in the page."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{probed}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return title[1].split("|")


@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_checkpoint_report(width: int, dark: bool, tiny_compressed: Path, tmp_path: Path) -> None:
    assert main(["report", str(tiny_compressed), "-o", str(tmp_path / "page.html")]) == 0
    inner, wide, background, down, up = shown(tmp_path / "page.html", width, dark, tmp_path)
    assert abs(int(inner) - width) < 30
    assert int(wide) <= 0
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    ranks = [-1 if rank == "dense" else int(rank) for rank in down.split()]
    assert len(ranks) == 21
    assert ranks == sorted(ranks, reverse=True)
    assert up.split() == sorted(down.split(), key=lambda rank: -1 if rank == "dense" else int(rank))
