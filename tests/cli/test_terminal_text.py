"""No text of a file controls the terminal, whatever its encoding, and sizes have units that suit them."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgsvd_vllm.cli.output import Output
from pgsvd_vllm.cli.printable import printable
from pgsvd_vllm.errors import bytes_text
from tests.conftest import ROOT

CODE = "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"


@pytest.mark.parametrize("number", [*range(32), 0x7F, *range(0x80, 0xA0), 0x200B, 0x202E, 0x2028, 0xD800, 0xE0001])
def test_no_control_character_is_printed(number: int) -> None:
    stream = io.StringIO()
    Output(stream).write(f"a{chr(number)}b")
    text = stream.getvalue()
    assert text.isprintable() or chr(number) in "\n\t"
    assert text[0] + text[-1] == "ab"
    if chr(number) not in "\n\t":
        assert f"{number:x}" in text


def test_printable_text_stays_as_it_is() -> None:
    for text in ("", "é und 漢字 \N{GRINNING FACE}", "two\nlines\tand a tab"):
        assert printable(text, "utf-8") == text
    assert printable("漢é", "latin-1") == r"\u6f22é"
    assert printable("é", "ascii") == r"\xe9"


def test_progress_bars_may_move_but_messages_may_not() -> None:
    for text in ("\x1b[A", "\n\n", "\x1b[A\x1b[A"):
        assert printable(text, "utf-8") == text
    assert printable("\rbar", "utf-8", "\n\t\r") == "\rbar"
    assert printable("model\x1b[A", "utf-8") == r"model\x1b[A"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_inspect_prints_any_name_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    folder = shutil.copytree(ROOT / "tests" / "data" / "checkpoint_v1", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"] = "a\x1b]0;b\x07\ud800\N{RIGHT-TO-LEFT OVERRIDE}é"
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", CODE, "inspect", str(folder)],
        capture_output=True,
        check=False,
        env={"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert r"a\x1b]0;b\x07\ud800\u202e" in text
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (1_234_567, "1.2 MB"),
        (3.5e9, "3.5 GB"),
        (4e12, "4000.0 GB"),
    ],
)
def test_sizes_have_units_that_suit_them(count: float, text: str) -> None:
    assert bytes_text(count) == text
