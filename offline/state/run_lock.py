"""A lock on the folder of a run, so that two processes never write into it. It ends with its process."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from pgsvd_vllm.errors import InputError

LOCK_FILE = "run.lock"
# What flock reports on file systems without locks; EBADF on network file systems that lock only files open for writing.
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
# Times that the folder may vanish while it is locked.
ATTEMPTS = 100
# Bytes of the lock file: a shorter signature ends in blanks.
SIGNATURE = 512


class RunLock:
    """Locks a folder, which is created if it is missing.

    Args:
        folder: to lock.
        target: what the folder's run writes, for messages.
        shared: whether other processes that only read the folder may hold it at the same time.

    Attributes:
        works: whether the file system has locks.

    Raises:
        InputError: another process holds the folder.
        OSError: the folder cannot be created.
    """

    def __init__(self, folder: Path, target: Path, shared: bool = False) -> None:
        self.folder, self.target = folder, target
        self.works = True
        self._handle: int | None = None
        for _ in range(ATTEMPTS):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._handle = self._open()
            except FileNotFoundError:
                continue  # the last holder has deleted the folder in the meantime
            if self._handle is None:
                return
            self._lock(fcntl.LOCK_EX, *([fcntl.LOCK_SH] if shared else []))
            if self._is_current():
                self._sign()
                return
            self.release()
        raise InputError(f"{folder}: cannot be locked; remove it")

    @property
    def _file(self) -> Path:
        return self.folder / LOCK_FILE

    def _open(self) -> int | None:
        """A handle of the lock file; None in a folder without one that this user can only read: nobody writes there."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return os.open(self._file, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
                raise
        return os.open(self._file, os.O_RDONLY | flags) if self._file.exists() else None

    def _is_current(self) -> bool:
        """Whether the handle is that of the file that now has the name."""
        assert self._handle is not None
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self._file))
        except FileNotFoundError:
            return False

    def _lock(self, *kinds: int) -> None:
        """Take the first kind of lock that is free; raises InputError if none is."""
        if self._handle is None:
            return
        for kind in kinds:
            try:
                fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.works = False
            return
        holder = self._holder()
        self.release()
        raise InputError(f"another run{holder} is writing {self.target}; wait for its end, or stop it")

    def _sign(self) -> None:
        """Write who holds the lock into its file, for the message of the next one who wants it."""
        assert self._handle is not None
        row = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # on a full disk, or in a file of another user, the message is shorter
            os.pwrite(self._handle, json.dumps(row).encode().ljust(SIGNATURE), 0)

    def _holder(self) -> str:
        """The process that signed the lock, in parentheses; empty if it cannot be read."""
        assert self._handle is not None
        try:
            row = json.loads(os.pread(self._handle, SIGNATURE, 0))
            host = "" if row["host"] == socket.gethostname() else f" on {row['host']}"
            return f" (pid {int(row['pid'])}{host}, since {row['since']})"
        except (OSError, ValueError, TypeError, KeyError):
            return ""

    def exclude_others(self) -> None:
        """Turn a shared lock into an exclusive one; raises InputError if another process holds the folder."""
        self._lock(fcntl.LOCK_EX)

    def share(self) -> None:
        """Let other processes read the folder."""
        if self._handle is not None and self.works:
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def delete(self) -> None:
        """Delete the lock file and the folder, if it is empty; the lock is still held."""
        self._file.unlink(missing_ok=True)
        self.folder.rmdir()

    def release(self) -> None:
        """End the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
