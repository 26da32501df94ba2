"""The output of inspect, verify, tune, env, --help and --version, compared with the files."""

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pgsvd_vllm
from pgsvd_vllm.cli import COMMANDS, main
from tests.conftest import run_cli
from tests.docs.pages import check_command


@pytest.fixture
def checkpoint(tiny_compressed: Path, tmp_path: Path) -> Path:
    """A copy of the compressed model that a test damages."""
    return Path(shutil.copytree(tiny_compressed, tmp_path / "checkpoint"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    errors = capsys.readouterr().err
    assert code == 2, errors
    assert "Traceback" not in errors
    (line,) = errors.splitlines()
    assert line.startswith("pgsvd-vllm: error: ")
    return line


def weights(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_version_and_help_of_the_command() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"pgsvd-vllm {pgsvd_vllm.__version__}\n")
    assert importlib.metadata.version("pgsvd-vllm") == pgsvd_vllm.__version__
    done = run_cli("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\w", done.stdout, re.MULTILINE), f"{command} is not listed"
    assert "vllm serve DIR --load-format pgsvd" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_command_are_valid(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert lines
    for line in lines:
        assert check_command(line.strip()) == command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pgsvd-vllm {command}")
    if command == "compress":
        for option in (
            "--ratio",
            "--tolerance",
            "--sensitivity",
            "--dataset",
            "--ignore",
            "--dtype",
            "--resume",
            "--dry-run",
        ):
            assert option in text
        assert "REMOVE" in text


def test_env_prints_the_installed_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " plugin" not in line)
    assert facts["pgsvd-vllm"] == pgsvd_vllm.__version__
    assert facts["torch"] == importlib.metadata.version("torch")
    assert facts["transformers"] == importlib.metadata.version("transformers")
    assert "cores" in facts["cpu"]
    assert facts["python"].count(".") == 2


def test_env_sees_the_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    assert re.search(r"^vllm plugin +registered$", capsys.readouterr().out, re.MULTILINE)


def test_inspect_agrees_with_the_weight_files(capsys: pytest.CaptureFixture[str], tiny_compressed: Path) -> None:
    assert main(["inspect", str(tiny_compressed)]) == 0
    text = capsys.readouterr().out
    tensors = load_file(weights(tiny_compressed))
    section = json.loads((tiny_compressed / "config.json").read_text())["quantization_config"]
    report = json.loads((tiny_compressed / "pgsvd_report.json").read_text())["modules"]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("model.layers.")}
    assert set(rows) == {row["name"] for row in report}
    assert len(rows) == 21
    kept = dense = factor_bytes = 0
    for row in report:
        out, width, rank, share, bits, size, error = rows[row["name"]]
        if row["rank"] is None:
            assert rank == "dense"
            shape, numel = tensors[f"{row['name']}.weight"].shape, tensors[f"{row['name']}.weight"].numel()
        else:
            p, c, pivots = (tensors[f"{row['name']}.{suffix}"] for suffix in ("weight_p", "weight_c", "pivots"))
            assert int(rank) == row["rank"] == len(p) == c.shape[1] == len(pivots)
            shape, numel = torch.Size((len(p) + len(c), p.shape[1])), p.numel() + c.numel() + len(pivots)
            factor_bytes += 4 * numel
        assert (int(out), int(width)) == tuple(shape)
        # Each value is printed with rounding to its last digit.
        assert float(share.rstrip("%")) == pytest.approx(100 * numel / shape.numel(), abs=0.0501)
        assert float(bits) == pytest.approx(32 * numel / shape.numel(), abs=0.0501)
        assert float(size) == pytest.approx(4 * numel / 1e6, abs=0.00501)
        assert float(error) == pytest.approx(row["error"], abs=0.0000501)
        kept, dense = kept + numel, dense + shape.numel()
    total_bytes = sum(4 * t.numel() for t in tensors.values())
    assert f"{len(section['modules'])}, {factor_bytes / 1e6:.1f} MB of {total_bytes / 1e6:.1f} MB" in text
    removed = 100 * (1 - kept / dense)
    shares = r"removed +([\d.]+)% of the projections, ([\d.]+)% of the model \(kept: ([\d.]+)% and ([\d.]+)%\)"
    found = re.search(shares, text)
    assert found
    assert float(found[1]) == pytest.approx(removed, abs=0.0501)
    before = json.loads((tiny_compressed / "pgsvd_report.json").read_text())["parameters"]["before"]
    after = sum(t.numel() for t in tensors.values())
    assert float(found[2]) == pytest.approx(100 * (1 - after / before), abs=0.0501)
    assert float(found[3]) == pytest.approx(100 - removed, abs=0.0501)
    assert float(found[4]) == pytest.approx(100 * after / before, abs=0.0501)
    assert section["sensitivity"] == "measured"
    assert "ranks by measured losses" in text
    assert f"pgsvd-vllm {pgsvd_vllm.__version__}" in text


def test_inspect_works_without_a_report(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    (checkpoint / "pgsvd_report.json").unlink()
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    modules = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    rows = [line.split() for line in text.splitlines() if line.startswith("model.layers.")]
    assert {row[0]: int(row[3]) for row in rows} == {name: m["rank"] for name, m in modules.items()}
    assert {row[7] for row in rows} == {"-"}


def test_inspect_tp_totals_equal_the_sum_of_the_rows(
    capsys: pytest.CaptureFixture[str], tiny_compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSVD_COLLECTIVE_BYTES", "0")
    assert main(["inspect", str(tiny_compressed), "--tp", "4"]) == 0
    text = capsys.readouterr().out.partition("\nlayer ")[2]
    names, rows = [], []
    for line in text.splitlines():
        if line.startswith("model.layers."):
            *layer, cut, here, share, sent, dense = line.split()
            names += layer
            rows.append((cut, float(here), float(share.rstrip("%")), int(sent), int(dense)))
    modules = json.loads((tiny_compressed / "config.json").read_text())["quantization_config"]["modules"]
    assert {name.strip(",").rpartition(".")[2] for name in names} >= {name.rpartition(".")[2] for name in modules}
    total = re.search(r"on each of 4 ranks +([\d.]+) MB of ([\d.]+) MB \(([\d.]+)%\)", text)
    counted = re.search(r"sent per token +(\d+) .*; dense (\d+)", text)
    assert total is not None
    assert counted is not None
    assert float(total[1]) == pytest.approx(sum(row[1] for row in rows), abs=0.01 * len(rows) + 0.05)
    assert 25 <= float(total[3]) == pytest.approx(100 * float(total[1]) / float(total[2]), rel=0.2)
    assert int(counted[1]) == sum(row[3] for row in rows) <= int(counted[2]) == sum(row[4] for row in rows)
    assert {"all_reduce_z", "replicated"} <= {row[0] for row in rows}
    assert all(25 <= row[2] <= 100 for row in rows)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"modules": 3}',
        '{"modules": [3]}',
        '{"modules": [{"name": "a"}]}',
        '{"modules": [{"name": "a", "rank": "x", "out_features": 0, "in_features": 0, "error": 0}]}',
        '{"modules": [{"name": 1, "rank": 1, "out_features": 2, "in_features": 2, "error": "x"}]}',
    ],
)
def test_a_damaged_report_is_named(capsys: pytest.CaptureFixture[str], checkpoint: Path, content: str) -> None:
    (checkpoint / "pgsvd_report.json").write_text(content)
    assert "pgsvd_report.json" in error_of(capsys, "inspect", checkpoint)
    # The report is not part of the checkpoint.
    assert main(["verify", str(checkpoint)]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[0].update(rank=3),
        lambda rows: rows[0].update(rank=None),
        lambda rows: rows[0].update(out_features=3),
        lambda rows: rows[0].update(name=rows[1]["name"]),
        lambda rows: rows.pop(0),
    ],
    ids=["rank", "dense", "shape", "name", "missing"],
)
def test_a_report_of_another_checkpoint_is_named(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    path = checkpoint / "pgsvd_report.json"
    report = json.loads(path.read_text())
    change(report["modules"])
    path.write_text(json.dumps(report))
    line = error_of(capsys, "inspect", checkpoint)
    assert "pgsvd_report.json: does not describe this checkpoint, model.layers.0" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "special_tokens_map.json"])
def test_verify_finds_a_json_file_that_is_cut_off(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, name: str
) -> None:
    (checkpoint / name).write_text('{"model": {"vocab')
    assert f"{name}: not valid JSON" in error_of(capsys, "verify", checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("ratio", 3), ("ratio", {"linear": 0.1}), ("ratio", {"linear": "x", "total": 0}), ("tolerance", 0.1),
     ("tolerance", {"language": "x"}), ("calibration", "text")],
)  # fmt: skip
def test_a_damaged_config_section_is_named(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, key: str, value: object
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"][key] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "config.json" in error_of(capsys, "inspect", checkpoint)


def test_verify_prints_the_checked_counts(capsys: pytest.CaptureFixture[str], tiny_compressed: Path) -> None:
    assert main(["verify", str(tiny_compressed)]) == 0
    tensors = load_file(weights(tiny_compressed))
    modules = json.loads((tiny_compressed / "config.json").read_text())["quantization_config"]["modules"]
    text = capsys.readouterr().out
    assert f"{len(tensors)} tensors in 1 files, {len(modules)} factored projections" in text


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_verify_finds_one_value_that_is_not_finite(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, value: float
) -> None:
    path = weights(checkpoint)
    tensors = load_file(path)
    name = sorted(n for n in tensors if n.endswith("weight_c"))[3]
    tensors[name][-1, -1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    assert "SHA-256" in error_of(capsys, "verify", checkpoint)
    # As a faulty writer leaves it.
    index = checkpoint / "pgsvd.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    index.write_text(json.dumps(content))
    line = error_of(capsys, "verify", checkpoint)
    assert name in line
    assert path.name in line
    # inspect reads no tensor data.
    assert main(["inspect", str(checkpoint)]) == 0


def test_verify_finds_flipped_header_bits(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    path = weights(checkpoint)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    start = whole.index(b"model.layers")
    for position in (0, 3, 7, 8, start, start + 8, header // 2, header - 2):
        for bit in (1, 0x40):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            error_of(capsys, "verify", checkpoint)
    path.write_bytes(whole)
    assert main(["verify", str(checkpoint)]) == 0


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_folders_that_are_not_checkpoints_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, command: str
) -> None:
    assert str(tmp_path / "absent") in error_of(capsys, command, tmp_path / "absent")
    assert "config.json" in error_of(capsys, command, tmp_path)
    assert "pgsvd-vllm compress" in error_of(capsys, command, tiny_model)
    error_of(capsys, command, "x" * 300)


def test_tune_dry_run_lists_the_layers_without_a_gpu(
    tiny_compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(tiny_compressed), "--dry-run", "-o", str(tmp_path / "table.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    match = re.fullmatch(r"(\d+) layers with low-rank projections, (\d+) of different sizes", lines[0])
    assert match is not None
    assert 1 <= int(match[2]) <= int(match[1]) <= 12
    assert len(lines) == 1 + int(match[2])
    assert all(
        re.fullmatch(r"  (128|320) inputs, \d+ rows of the down GEMM(, \d+ outputs of rank \d+)?", line)
        for line in lines[1:]
    )
    assert not list(tmp_path.iterdir())


def test_tune_names_its_requirements(
    tiny_compressed: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the command would tune")
    assert "torch finds no GPU on this machine; --dry-run needs none" in error_of(capsys, "tune", tiny_compressed)
    assert "must be 1 or more" in error_of(capsys, "tune", tiny_compressed, "-tp", 0)
    assert "not a pgsvd checkpoint" in error_of(capsys, "tune", tiny_model)
