"""Two runs never write into one folder, and the second one is told about the first."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.state.run_lock import LOCK_FILE, RunLock

SMALL: dict[str, Any] = {"num_calibration_samples": 20, "max_seq_length": 48}


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_on_one_folder_is_refused(tiny_model: Path, tmp_path: Path, resume: bool) -> None:
    output, errors = tmp_path / "out", []

    def start_another(line: str) -> None:
        if line.startswith("ranks by"):
            with pytest.raises(InputError) as caught:
                compress(CompressOptions(str(tiny_model), output, ratio=0.3, resume=resume, **SMALL))
            errors.append(str(caught.value))

    compress(CompressOptions(str(tiny_model), output, ratio=0.3, **SMALL), start_another)
    assert len(errors) == 1
    assert re.fullmatch(rf"another run \(pid {os.getpid()}, since [-0-9]+ [:0-9]+\) is writing {output}; .*", errors[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_calibration_folder_has_one_writer_and_many_readers(tiny_model: Path, tmp_path: Path) -> None:
    folder, errors = tmp_path / "shared", []

    def options(name: str, **changes: Any) -> CompressOptions:
        return CompressOptions(str(tiny_model), tmp_path / name, calibration=folder, **{**SMALL, **changes})

    lock = RunLock(folder, folder)
    with pytest.raises(InputError, match=f"another run .* is writing {folder}"):
        compress(options("first"))
    lock.release()

    def read_beside(line: str) -> None:
        if line.startswith("ranks by"):
            compress(options("second", ratio=0.5))
            with pytest.raises(InputError) as caught:  # it would have to measure
                compress(options("third", sensitivity="forward"))
            errors.append(str(caught.value))

    compress(options("first"), read_beside)
    assert (tmp_path / "second" / "config.json").is_file()
    assert len(errors) == 1
    assert "another run" in errors[0]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = "from pathlib import Path; from pgsvd_vllm.offline.state.run_lock import RunLock; import sys, time\n"
    code += "RunLock(Path(sys.argv[1]), Path('DIR')); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"another run \(pid {process.pid}, since .*\) is writing DIR"):
        RunLock(tmp_path, Path("DIR"))
    process.kill()
    process.wait()
    RunLock(tmp_path, Path("DIR")).release()


def test_a_lock_deleted_by_its_holder_is_made_anew(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "x", Path("DIR"))
    with pytest.raises(InputError):
        RunLock(tmp_path / "x", Path("DIR"))
    first.delete()
    second = RunLock(tmp_path / "x", Path("DIR"))
    first.release()
    with pytest.raises(InputError):
        RunLock(tmp_path / "x", Path("DIR"))
    second.release()


def test_a_file_system_without_locks_is_reported(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_handle: int, _kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    compress(CompressOptions(str(tiny_model), tmp_path / "out", ratio=0.3, **SMALL), said.append)
    assert [line for line in said if "has no locks" in line and "out.partial" in line]
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("content", ["", "x", "[]", '{"pid": "x"}'])
def test_an_unreadable_signature_still_refuses(tmp_path: Path, content: str) -> None:
    lock = RunLock(tmp_path, Path("DIR"))
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(InputError, match="another run is writing DIR"):
        RunLock(tmp_path, Path("DIR"))
    lock.release()
