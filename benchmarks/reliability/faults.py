"""Runs of the command in processes that are killed, interrupted or denied files at a chosen moment.

Each run is a fork of a process that has imported everything, which saves the seconds of the imports. Faults are planted
in the fork, around the functions through which every file operation of a run passes; the product has no hooks.
"""

import builtins
import hashlib
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from tqdm.auto import tqdm

from pgsvd_vllm.cli import main as command

# File operations of `os`, and the position of the path that names one.
OPERATIONS = {"replace": 1, "rename": 1, "mkdir": 0, "unlink": 0, "rmdir": 0, "fsync": 0}
TIMEOUT = 300.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its status, negative after a signal, and what it printed."""

    status: int
    text: str

    @property
    def last(self) -> str:
        """The last line that it printed."""
        return ([line for line in self.text.splitlines() if line.strip()] or [""])[-1]

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with one line for the user and exit status 2."""
        lines = [line for line in self.text.splitlines() if "pgsvd-vllm: error:" in line]
        return self.status == 2 and len(lines) == 1 and "Traceback" not in self.text and "internal" not in self.text


class Process:
    """A fork that runs the command.

    Args:
        arguments: of the command.
        log: file for its output.
        before: called in the fork before the command.
        shown: the arguments as the checkpoint quotes them.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, before: Callable[[], object], shown: Sequence[str] = ()
    ) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for number in (1, 2):
                    os.dup2(handle, number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                sys.argv = ["pgsvd-vllm", *(shown or arguments)]
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                    signal.signal(number, signal.default_int_handler)
                # The lock of progress bars is shared with all forks: one that was killed may hold it for ever.
                tqdm.set_lock(threading.RLock())
                before()
                status = command(arguments)
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 70
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self) -> Outcome:
        """How it ended; it is killed after TIMEOUT seconds."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return Outcome(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)


class Recorder:
    """Sees every file operation below a folder, in the process in which it is installed.

    Args:
        root: the folder.
        act: called before and after each operation with its number, its name and `before`, `half` or `after`.
    """

    def __init__(self, root: Path, act: Callable[["Recorder", int, str, str], None]) -> None:
        self.root, self.act = str(root), act
        self.count = 0
        self.events: list[str] = []
        # Inodes of the files written and not yet synced.
        self.unsynced: set[int] = set()

    def install(self) -> None:
        """Wrap the functions."""
        for name, position in OPERATIONS.items():
            setattr(os, name, self._wrapped(getattr(os, name), name, position))
        save, real = safetensors.torch.save_file, io.open

        def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            self._around("save", Path(filename), lambda: save(tensors, filename, *args, **kwargs))

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not str(file).startswith(self.root):
                return real(file, mode, *args, **kwargs)
            return self._around("open", Path(file), lambda: real(file, mode, *args, **kwargs))

        for module in list(sys.modules.values()):
            if getattr(module, "save_file", None) is save:
                module.save_file = save_file  # type: ignore[attr-defined]
        io.open = builtins.open = opened

    def _wrapped(self, real: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[position]
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif kwargs.get("dir_fd") is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), path)
            if not str(path).startswith(self.root):
                return real(*args, **kwargs)
            return self._around(name, Path(path), lambda: real(*args, **kwargs))

        return call

    def _around(self, name: str, path: Path, run: Callable[[], Any]) -> Any:
        number, self.count = self.count, self.count + 1
        title = f"{name} {path.relative_to(self.root) if str(path) != self.root else '.'}"
        self.events.append(title)
        self.act(self, number, title, "before")
        try:
            return run()
        finally:  # also after an operation that fails, such as the deletion of a file that is not there
            if name in ("save", "open") and path.is_file():
                self.unsynced.add(path.stat().st_ino)
                if name == "save":
                    self.act(self, number, title, "half")
            if name == "fsync":
                self.unsynced.discard(path.stat().st_ino)
            self.act(self, number, title, "after")

    def lose_unsynced(self) -> None:
        """Empty every file that has not been synced, as a power cut may."""
        nodes = {path.stat().st_ino: path for path in Path(self.root).rglob("*") if path.is_file()}
        for node in self.unsynced & nodes.keys():
            os.truncate(nodes[node], 0)


def kill_self() -> None:
    """End this process without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differing(folder: Path, reference: dict[str, str]) -> int:
    """Number of files that differ from a reference or are missing on one side."""
    found = contents(folder)
    return sum(found.get(name) != reference.get(name) for name in found.keys() | reference.keys())


def empty(folder: Path) -> None:
    """Delete what a case has left in a folder, whatever its permissions are."""
    for path in [folder, *folder.rglob("*")] if folder.exists() else []:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
