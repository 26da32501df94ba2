"""Messages name flags of the command line, and nothing else is rewritten; commands are published without paths."""

from pathlib import Path

import pytest

from pgsvd_vllm.cli.flags import shareable_command, with_flags


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`ratio` 0.9: more than it can give", "--ratio 0.9: more than it can give"),
        ("more `num_calibration_samples` may help", "more --num-calibration-samples may help"),
        ("use `no_sequential`, or another `output_dir`", "use --no-sequential, or another --output-dir"),
        ("`hidden_size` must be divisible by `num_attention_heads`",) * 2,
    ],
)
def test_only_fields_of_options_become_flags(message: str, shown: str) -> None:
    assert with_flags(message) == shown


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("-o/home/someone/out", "-oout"),
        ("--output-dir=/home/someone/out", "--output-dir=out"),
        ("/home/someone/model", "model"),
        ("out", "out"),
        ("--ratio=vision=0.1", "--ratio=vision=0.1"),
        ("-tp", "-tp"),
    ],
)
def test_published_commands_have_no_absolute_paths(argument: str, shown: str) -> None:
    assert shareable_command(["compress", argument]) == f"pgsvd-vllm compress {shown}"


def test_a_snapshot_is_published_as_its_hub_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert shareable_command([str(snapshot)]) == "pgsvd-vllm someone/tiny"
