"""Links of the documents beside docs/, which mkdocs does not read, and what the built pages load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import slugs

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def dead_links(document: Path) -> list[str]:
    """The links of a document to files and headings that do not exist."""
    dead = []
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if name.startswith(("http://", "https://")):
            continue
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in slugs(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    assert dead_links(document) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A `b` % c\n\n[1](a.md#a-b--c) [2](a.md#a-b-c) [3](b.md) [4](#a-b--c)\n")
    assert dead_links(tmp_path / "a.md") == ["a.md#a-b-c", "b.md"]


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    loads = re.compile(r"""(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*\shref)=["'](?:https?:)?//[^"']*""")
    assert [found for page in pages for found in loads.findall(page.read_text(encoding="utf-8"))] == []
    styles = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css")]
    assert styles
    assert [
        found for text in styles for found in re.findall(r"""(?:@import|url\()\s*["']?(?:https?:)?//\S+""", text)
    ] == []
