"""What a file holds reaches the terminal as printable text of bounded length, in errors and in tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.targets import MODULES, write_checkpoint
from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import CheckpointError, InputError
from pgsvd_vllm.format.schema import INDEX_NAME, REPORT_NAME

HOSTILE = "\x1b[2J\x7f\u202e\ufeff\ud800\0\x85\t"


def changed(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def add_module(name: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        config["quantization_config"]["modules"][name] = {"rank": 1, "form": "pivot"}

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", add_module(f"model.{HOSTILE}")),
        ("config.json", lambda config: config["quantization_config"].update(version=HOSTILE, tool_version=HOSTILE)),
        (INDEX_NAME, lambda index: index["weight_map"].update({"lm_head.weight_u": HOSTILE})),
        (INDEX_NAME, lambda index: index["weight_map"].update({HOSTILE: "pgsvd-00001-of-00002.safetensors"})),
    ],
)
def test_errors_show_control_characters_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, change: Callable[[Any], None]
) -> None:
    write_checkpoint(tmp_path / "c")
    changed(tmp_path / "c" / file, change)
    assert main(["verify", str(tmp_path / "c")]) == 2
    message = capsys.readouterr().err
    assert message.removesuffix("\n").isprintable(), message
    assert r"\x1b[2J" in message


def _dense_row(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"name": HOSTILE, "rank": None}


def test_inspect_shows_control_characters_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    write_checkpoint(folder)
    changed(folder / "config.json", lambda config: config["quantization_config"].update(base_model=HOSTILE))
    # A row of a dense projection: those of the factored ones must be in the module table.
    changed(folder / REPORT_NAME, lambda report: report["modules"].append(_dense_row(report["modules"][0])))
    assert main(["inspect", str(folder)]) == 0
    table = capsys.readouterr().out
    assert table.translate({9: None, 10: None}).isprintable()
    assert table.count(r"\x1b[2J") == 2
    assert list(MODULES)[1] in table


def test_a_name_of_any_length_gives_a_short_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "c")
    changed(tmp_path / "c" / "config.json", add_module("x" * 1_000_000))
    assert main(["verify", str(tmp_path / "c")]) == 2
    message = capsys.readouterr().err
    assert len(message) < 2000
    assert message.startswith(f"pgsvd-vllm: error: {tmp_path}")
    assert message.rstrip().endswith("missing")


def test_short_messages_stay_as_they_are() -> None:
    for text in ("", "é und 漢字", "two\nlines"):
        assert str(InputError(text)) == str(CheckpointError(text)) == text
