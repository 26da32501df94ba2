"""Interrupted runs: DIR exists complete or not at all, and finished layers are kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.planning.plan import make_plan
from pgsvd_vllm.offline.planning.resources import estimate
from tests.conftest import run_cli, save_tiny_model

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48}
LAYERS = 6


def start_cli(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        # A test runner in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def interrupt(process: subprocess.Popen[str], when: Callable[[], bool], number: signal.Signals) -> None:
    """Send a signal as soon as `when` holds, and check the exit status and the last line."""
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("pgsvd-vllm: interrupted; ")
    # "repeat" where compiled code turned the interrupt into another error.
    assert last.endswith(("continue with --resume", "repeat with --resume"))


def test_an_interrupted_and_resumed_run_gives_equal_bytes(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=LAYERS)
    arguments = ["--ratio", "0.4", "--num-calibration-samples", "32", "--max-seq-length", "256"]
    straight, output = tmp_path / "straight", tmp_path / "out"
    partial = tmp_path / "out.partial"
    done = run_cli("compress", model, "-o", straight, *arguments)
    assert done.returncode == 0, done.stderr

    def finished() -> int:
        return len(list(partial.glob("layers/?????.safetensors")))

    command = ["compress", model, "-o", output, *arguments]
    interrupt(start_cli(*command), lambda: finished() >= 1, signal.SIGINT)
    first = finished()
    assert 1 <= first < LAYERS
    assert not output.exists()
    stamps = {p.name: p.stat().st_mtime_ns for p in partial.glob("layers/?????.safetensors")}

    # The signal of a job scheduler, while the checkpoint is written.
    interrupt(start_cli(*command, "--resume"), lambda: (partial / "checkpoint").exists(), signal.SIGTERM)
    assert finished() == LAYERS
    assert not output.exists()
    for name, stamp in stamps.items():
        assert (partial / "layers" / name).stat().st_mtime_ns == stamp, "a finished layer was calibrated again"

    done = run_cli(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert not partial.exists()
    names = sorted(p.name for p in straight.iterdir())
    assert sorted(p.name for p in output.iterdir()) == names
    for name in names:
        if name in ("config.json", "README.md", "report.html"):  # they contain the command line
            continue
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name
    tables = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (straight, output)]
    for key in ("modules", "tolerance", "ratio", "calibration"):
        assert tables[0][key] == tables[1][key]


def test_an_interruption_that_compiled_code_loses_keeps_finished_layers(tmp_path: Path, tiny_model: Path) -> None:
    """As where torch calls back into Python, drops its KeyboardInterrupt and raises an error of its own."""
    code = (
        "import os, signal, sys, time; from pgsvd_vllm.errors import InputError\n"
        "from pgsvd_vllm.cli import main; import pgsvd_vllm.offline.compress as module; run = module.calibrate\n"
        "def calibrate(*arguments, **options):\n"
        "    run(*arguments)\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(10)\n"
        "    except KeyboardInterrupt: raise InputError('no shape') from None\n"
        "module.calibrate = calibrate; sys.exit(main())"
    )
    arguments = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--dataset", "python-docs"]
    arguments += ["--num-calibration-samples", "20", "--max-seq-length", "48"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.splitlines()[-1].startswith("pgsvd-vllm: interrupted; finished layers are kept in ")
    assert run_cli(*arguments, "--resume").returncode == 0


def test_an_interrupt_before_the_first_layer_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    output = tmp_path / "out"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(CompressOptions(str(tiny_model), output, ratio=0.3, **SMALL), say=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interrupted(tmp_path: Path, tiny_model: Path) -> Path:
    """The output path of a run that was interrupted after its calibration."""

    def stop(line: str) -> None:
        if line.startswith("ranks by"):
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(CompressOptions(str(tiny_model), output, ratio=0.3, **SMALL), say=stop)
    assert not output.exists()
    assert len(list(tmp_path.glob("out.partial/layers/?????.safetensors"))) == 3
    return output


def test_a_partial_folder_needs_resume(interrupted: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"out\.partial: .*--resume"):
        compress(CompressOptions(str(tiny_model), interrupted, ratio=0.3, **SMALL))
    assert len(list(interrupted.with_name("out.partial").glob("layers/?????.safetensors"))) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "calibration text"),
        ({"num_calibration_samples": 21}, "calibration text"),
        ({"max_seq_length": 47}, "calibration text"),
        ({"ignore": ("*.up_proj",)}, "ignore"),
    ],
)
def test_resume_with_other_options_is_refused(
    interrupted: Path, tiny_model: Path, change: dict[str, Any], named: str
) -> None:
    options = {**SMALL, "ratio": 0.3, "resume": True, **change}
    with pytest.raises(InputError, match=f"--resume: .*another {named}"):
        compress(CompressOptions(str(tiny_model), interrupted, **options))
    assert not interrupted.exists()
    assert len(list(interrupted.with_name("out.partial").glob("layers/?????.safetensors"))) == 3, (
        "the calibration was lost"
    )


def test_resume_with_another_dtype_is_refused(interrupted: Path, tiny_model: Path) -> None:
    """Such a folder comes from a CPU with bfloat16 GEMMs."""
    run = interrupted.with_name("out.partial") / "run.json"
    content = json.loads(run.read_text())
    content["dtype"] = {"torch.float32": "torch.bfloat16"}[content["dtype"]]
    run.write_text(json.dumps(content))
    with pytest.raises(InputError, match="--resume: .*another dtype"):
        compress(CompressOptions(str(tiny_model), interrupted, ratio=0.3, resume=True, **SMALL))


def test_resume_with_other_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)

    def stop(line: str) -> None:
        if line.startswith("ranks by"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(CompressOptions(str(model), tmp_path / "out", ratio=0.3, **SMALL), say=stop)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(2)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="another weights"):
        compress(CompressOptions(str(model), tmp_path / "out", ratio=0.3, resume=True, **SMALL))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"'])
def test_a_damaged_run_file_is_named(interrupted: Path, tiny_model: Path, content: str) -> None:
    run = interrupted.with_name("out.partial") / "run.json"
    run.write_text(content)
    with pytest.raises(InputError, match=r"run\.json|another"):
        compress(CompressOptions(str(tiny_model), interrupted, ratio=0.3, resume=True, **SMALL))


def test_resume_without_a_partial_folder_is_a_plain_run(tiny_model: Path, tmp_path: Path) -> None:
    compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, resume=True, **SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_created_during_the_run_is_not_replaced(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def create_output(line: str) -> None:
        if line.startswith("ranks by"):
            output.mkdir()
            (output / "note.txt").write_text("x")

    with pytest.raises(InputError, match=f"--output-dir {output}"):
        compress(CompressOptions(str(tiny_model), output, ratio=0.3, **SMALL), say=create_output)
    assert [p.name for p in output.iterdir()] == ["note.txt"]


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of a given number of bytes."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system of limited size")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        # A test that fails may still have files of it mapped.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write a file that takes all free space."""
    path = folder / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free)
    return path


def test_a_disk_that_is_too_small_is_refused_at_once(tiny_model: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1024 * 1024)
    with pytest.raises(InputError, match=r"`output_dir` .*of disk space during the run, [\d.]+ (bytes|[KM]B) are free"):
        compress(CompressOptions(str(tiny_model), disk / "out", ratio=0.3, **SMALL))
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_calibration(tiny_model: Path, small_disk: Callable[[int], Path]) -> None:
    probe = CompressOptions(str(tiny_model), Path("/nowhere/out"), ratio=0.3, **SMALL)
    disk = small_disk(int(estimate(make_plan(probe)).disk) + 256 * 1024)
    output, fillers = disk / "out", []

    def say(line: str) -> None:
        if line.startswith("ranks by"):
            fillers.append(fill(disk))

    with pytest.raises(InputError, match=r"the disk is full.*--resume"):
        compress(CompressOptions(str(tiny_model), output, ratio=0.3, **SMALL), say=say)
    assert not output.exists()
    assert len(list(disk.glob("out.partial/layers/?????.safetensors"))) == 3
    resume = CompressOptions(str(tiny_model), output, ratio=0.3, resume=True, **SMALL)
    with pytest.raises(InputError, match="disk"):
        compress(resume)
    assert len(list(disk.glob("out.partial/layers/?????.safetensors"))) == 3, "the failed resume lost the calibration"
    fillers[0].unlink()
    # The disk has the space that the first attempt needed; the kept layers are part of it.
    compress(resume)
    assert sorted(p.name for p in disk.iterdir()) == ["out"]


def test_a_full_disk_is_refused(tiny_model: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64 * 1024)
    filler = fill(disk)
    with pytest.raises(InputError, match="--output-dir"):
        compress(CompressOptions(str(tiny_model), disk / "out", ratio=0.3, **SMALL))
    assert list(disk.iterdir()) == [filler]


def test_a_calibration_folder_is_shared_by_other_runs(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=3)
    folder = tmp_path / "shared" / "here"

    def compressed(name: str, **options: Any) -> dict[str, bytes]:
        output = tmp_path / name
        compress(CompressOptions(str(model), output, **SMALL, **options))
        assert not output.with_name(f"{name}.partial").exists()
        return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}

    first = compressed("first", ratio=0.3, calibration=folder)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(stamps) == 6
    assert compressed("again", ratio=0.3, calibration=folder) == first == compressed("alone", ratio=0.3)
    assert compressed("smaller", ratio=0.5, calibration=folder) == compressed("smaller-alone", ratio=0.5)
    compressed("baseline", ratio=0.3, calibration=folder, baseline="svd-llm")
    for name, stamp in stamps.items():
        assert (folder / name).stat().st_mtime_ns == stamp, "a layer was calibrated again"

    with pytest.raises(InputError, match=r"--calibration .*here belongs to a run with another calibration text"):
        compressed("other", ratio=0.3, calibration=folder, seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(InputError, match=r"--calibration .*full: exists and holds something else"):
        compressed("other", ratio=0.3, calibration=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
    assert not (tmp_path / "other.partial").exists()
