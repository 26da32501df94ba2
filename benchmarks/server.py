"""Start and stop a real `vllm serve` on 127.0.0.1, and read what it uses."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 600


@dataclass(frozen=True)
class Server:
    """A running server: its base URL and the process that leads it."""

    url: str
    process: subprocess.Popen[bytes]

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


@contextlib.contextmanager
def serve(folder: Path, *options: str) -> Iterator[Server]:
    """`vllm serve FOLDER OPTIONS`, ready for requests; stopped on leaving.

    Raises:
        RuntimeError: the server ended or did not answer in START_SECONDS; shows the end of its log.
    """
    port = free_port()
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    # The setting is for engines inside one process; a server has its own engine process.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            start = time.monotonic()
            while not _answers(f"{url}/health"):
                waited = time.monotonic() - start
                if process.poll() is not None or waited > START_SECONDS:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-4000:]
                    raise RuntimeError(f"{' '.join(command)}: did not come up in {waited:.0f} s; its log ends:\n{tail}")
                time.sleep(0.5)
            yield Server(url, process)
        finally:
            _stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole process group of the server to end; insist after a while."""
    for sent, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
