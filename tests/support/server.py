"""A real `vllm serve` on a free port of 127.0.0.1, ended with everything it started.

For the demo, the benchmarks and the tests.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

READY_SECONDS = 420
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def peak_bytes(self) -> int:
        """Sum of the peak resident memory of the server's processes."""
        leader = psutil.Process(self.process.pid)
        total = 0
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
                peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                total += int(peak.split()[1]) * 1024
        return total


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(log: Path, characters: int = 6000) -> str:
    """The end of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-characters:]


def is_healthy(url: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll /health; raises with the end of the log when the server ends or takes too long."""
    begin, reported = time.monotonic(), 0.0
    while not is_healthy(url):
        waited = time.monotonic() - begin
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with status {process.returncode}:\n{tail(log)}")
        if waited > READY_SECONDS:
            raise TimeoutError(f"vllm serve is not ready after {READY_SECONDS} s:\n{tail(log)}")
        if waited - reported >= 10:
            reported = waited
            lines = tail(log).splitlines()
            print(f"waiting for vllm serve, {waited:.0f} s: {lines[-1] if lines else ''}", file=sys.stderr, flush=True)
        time.sleep(0.5)


def group_is_alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's process group: SIGTERM, then SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            # The leader must be reaped, or its group never disappears.
            process.poll()
            if not group_is_alive(process.pid):
                return
            time.sleep(0.2)
    raise RuntimeError(f"processes of group {process.pid} are still there after SIGKILL")


@contextlib.contextmanager
def serve(model: Path, log: Path, *options: str, variables: dict[str, str] | None = None) -> Iterator[Server]:
    """`vllm serve MODEL OPTIONS` until the block is left; `variables` are further ones of its environment."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *options,
    ]
    # The engine has a process of its own, as for users; only the offline engines of tests run in-process.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment |= variables or {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        wait_until_ready(url, process, log)
        yield Server(url, str(model), process, log)
    finally:
        stop(process)
