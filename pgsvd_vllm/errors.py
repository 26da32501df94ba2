"""The errors a user can cause, each with a message that names what to change, and parts of messages."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

# Characters of a longer message that are shown, of its begin and of its end: a file may hold a name of any length.
BEGIN_SHOWN, END_SHOWN = 1200, 400

# Signals that have asked this process to end.
signals: list[int] = []


@contextlib.contextmanager
def as_interruption() -> Iterator[None]:
    """Turn an error after a signal into KeyboardInterrupt.

    Compiled code that is interrupted inside a callback may lose the KeyboardInterrupt and raise an error of its own,
    which must not be taken for one of the user's.
    """
    try:
        yield
    except Exception:
        if signals:
            raise KeyboardInterrupt from None
        raise


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or its class where the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that no memory is free, which torch reports in several ways."""
    return isinstance(error, MemoryError) or re.search(r"can't allocate memory|out of memory", str(error)) is not None


def refusal_of(error: Exception, output: str) -> str | None:
    """The message for what the system refused, such as a write to a full disk; None for an error of another kind.

    safetensors reports a full disk and other failures of the system as errors of its own kind.

    Args:
        error: to explain.
        output: the option of the output and its value, named where the error names no file.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(found[1]) if found else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{output}: the disk is full; make room"
    if number is None and not isinstance(error, OSError):
        return None
    return f"{getattr(error, 'filename', None) or output}: {os.strerror(number) if number else reason_of(error)}"


def escaped(text: str) -> str:
    """A text with escapes in place of control characters other than line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def bytes_text(count: float) -> str:
    """A number of bytes in the unit that suits it, such as `1.5 GB`; units are powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


class PgsvdError(Exception):
    """Base of every error whose message is written for the user.

    The command line prints it as one line and exits with status 2. Messages of numeric code name an option by its
    field in backticks, such as `ratio`; the command line shows the flag instead. Names that files bring into a message
    are shown with escapes for control characters, and the middle of a very long message is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if not text.isprintable():  # vLLM and transformers print it as it is
            text = escaped(text)
        if len(text) > BEGIN_SHOWN + END_SHOWN:
            return f"{text[:BEGIN_SHOWN]} ... {text[-END_SHOWN:]}"
        return text


class CheckpointError(PgsvdError, ValueError):
    """A checkpoint is missing, damaged or not of this format; names the file or tensor."""


class InputError(PgsvdError, ValueError):
    """An option, a model or a calibration text cannot be used as given; names it."""


class ChoiceError(InputError):
    """No ranks give the requested size, latency or error; another value may, on the same calibration."""
