"""Standard output and error: a command survives their loss, and no text of a file controls the terminal."""

import errno
import os
import sys
from typing import Any, TextIO

from pgsvd_vllm.cli.printable import MOVES, printable

# The reader of a pipe has exited; the terminal is gone.
GONE = (errno.EPIPE, errno.EIO)


class Output:
    """A text stream that goes to the null device after its first failure.

    Args:
        stream: to write to.
        kept: control characters that are written as they are.

    Attributes:
        failure: the first error; None while the stream works.
        is_quiet: whether progress is left out.
    """

    is_quiet = False

    def __init__(self, stream: TextIO, kept: str = "\n\t") -> None:
        self._stream, self._kept = stream, kept
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, with escapes for what a terminal would obey; returns its length."""
        try:
            self._stream.write(printable(text, self._stream.encoding or "utf-8", self._kept))
            return len(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Write buffered text."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def end(self) -> None:
        """Write what waits for the end of its line."""

    def _lose(self, error: OSError) -> None:
        self.failure = self.failure or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    @property
    def is_incomplete(self) -> bool:
        """Whether someone still waits for text that could not be written, as on a full disk."""
        return self.failure is not None and self.failure.errno not in GONE


class Lines(Output):
    """The stream of progress bars in a file or a pipe: each state of a bar is a line of its own.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream, "\n\t")
        self._is_in_line = False

    def write(self, text: str) -> int:
        """Write text; a bar that begins with a carriage return goes on a line of its own."""
        if not text:
            return 0
        if text.startswith("\r"):
            found = text.strip("\r \n")
            if found:
                begin = "\n" if self._is_in_line else ""
                super().write(f"{begin}{found}\n")
                self._is_in_line = False
        elif not MOVES.fullmatch(text) or (text == "\n" and self._is_in_line):  # not what moves between bars
            super().write(text)
            self._is_in_line = not text.endswith("\n")
        return len(text)


def open_missing_streams() -> None:
    """Open the null device in the place of closed standard streams; a weight file must not get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (as long as the process)
