"""A command goes on without its output's reader, and never writes messages into its own files."""

import os
import subprocess
import sys
from pathlib import Path

from pgsvd_vllm.format.reader import check_data, open_checkpoint

CODE = "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"
FEW = ["--ratio", "0.3", "--num-calibration-samples", "20", "--max-seq-length", "48"]


def test_compress_survives_the_loss_of_both_streams(tiny_model: Path, tmp_path: Path) -> None:
    """As after `| head`, or when the terminal of a background job is gone."""
    read, write = os.pipe()
    os.close(read)
    output = tmp_path / "out"
    command = [sys.executable, "-c", CODE, "compress", str(tiny_model), "-o", str(output), *FEW]
    done = subprocess.run(command, stdout=write, stderr=write, cwd="/", check=False)
    os.close(write)
    assert done.returncode == 0
    check_data(open_checkpoint(output))
    assert not (tmp_path / "out.partial").exists()


def test_a_file_never_gets_the_number_of_a_closed_stream() -> None:
    """It would receive progress bars and warnings."""
    code = """
import os, sys
for number in range(3): os.close(number)
sys.stdout = sys.stderr = None
from pgsvd_vllm.cli.output import open_missing_streams
open_missing_streams()
print("to nowhere", file=sys.stderr)
os._exit(open(os.devnull).fileno())
"""
    # A failure ends with 1; other open files may have the first free numbers.
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode > 2


def test_output_on_a_full_disk_is_an_error(tiny_compressed: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", CODE, "inspect", str(tiny_compressed)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd="/", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "pgsvd-vllm: error: cannot write to standard output ([Errno 28] No space left on device)"
    ]


def test_progress_in_a_pipe_is_a_line_a_state(tiny_model: Path, tmp_path: Path) -> None:
    """And few of them: a bar that ends within half a minute has its begin and its end."""
    command = [sys.executable, "-c", CODE, "compress", str(tiny_model), "-o", str(tmp_path / "out"), *FEW]
    done = subprocess.run(
        [*command, "--dataset", "python-docs"], stderr=subprocess.PIPE, cwd="/", check=True
    ).stderr.decode()
    assert "\r" not in done
    lines = done.splitlines()
    assert all(line.strip() for line in lines)
    calibrate = [line for line in lines if line.startswith("calibrate:")]
    assert 1 <= len(calibrate) <= 3
    assert "100%" in calibrate[-1]
