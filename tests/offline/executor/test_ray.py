"""A run on a Ray cluster of several processes, one of which is killed."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, save_tiny_model

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",  # of this process and of the workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray listens on all interfaces
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def cluster(tmp_path: Path, workers: int) -> Iterator[str]:
    """The address of a cluster on this machine, with as many CPUs as workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", f"--num-cpus={workers}", "--include-dashboard=false"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    log = tmp_path / "ray.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(30)
            for child in psutil.wait_procs(started, timeout=10)[1]:
                child.kill()


def compress(*arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from pgsvd_vllm.cli import main; sys.exit(main())",
        "compress",
        *arguments,
    ]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def actors_of_machine() -> list[psutil.Process]:
    """The workers of the cluster, the only one on this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            if "ray::RayWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(("workers", "killed"), [(2, 0), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_run_on_a_cluster_writes_the_same_bytes(cluster: str, workers: int, killed: int, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=6)
    arguments = [str(model), "--dataset", "python-docs", "--num-calibration-samples", "512"]
    arguments += ["--max-seq-length", "64", "--ratio", "0.3", "--refine", "0"]
    serial = compress(*arguments, "-o", str(tmp_path / "serial"))
    said, _ = serial.communicate(timeout=300)
    assert serial.returncode == 0, said

    output = tmp_path / "out"
    run = compress(*arguments, "-o", str(output), "--executor", "ray", "--address", cluster)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out.partial" / "layers" / "00002.safetensors").is_file():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    actors = actors_of_machine()
    assert len(actors) == workers
    for actor in actors[:killed]:
        actor.kill()
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert f"ray: {workers} workers with 1 thread each on 1 machine" in said
    assert said.count("WARNING: a worker was lost") == killed
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "serial").glob("*.safetensors")) != []
    assert [name for name in files if (output / name).read_bytes() != (tmp_path / "serial" / name).read_bytes()] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: is of a Ray cluster; add --executor ray"),
        (["--executor", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: Ray cannot start or reach it"),
    ],
)
def test_a_cluster_that_is_not_there_is_named(given: list[str], message: str, tmp_path: Path, tiny_model: Path) -> None:
    run = compress(str(tiny_model), "-o", str(tmp_path / "out"), "--dataset", "python-docs", "--ratio", "0.3", *given)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
