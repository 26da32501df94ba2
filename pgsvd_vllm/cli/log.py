"""What a command prints while it works: `--quiet` omits progress, `--log-format json` makes each line an object."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TextIO

from pgsvd_vllm.cli.flags import with_flags
from pgsvd_vllm.cli.output import Lines, Output

# Between two states of a progress bar in a file or a pipe.
BAR_SECONDS = "30"
# A progress bar's state as its fields; tqdm fills them in.
_FIELD = "\x1f"
_BAR_FORMAT = _FIELD.join(("{desc}", "{n}", "{total}", "{elapsed_s}"))
WARNING = "WARNING: "
_SETTINGS = ("TQDM_MININTERVAL", "TQDM_BAR_FORMAT", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
# How lines of a level begin: our own, those of Python's warnings and of its loggers.
_LEVELS = {
    "warning": re.compile(r"WARNING: |WARNING:\S+:|(\S+:\d+: )?\w*Warning: "),
    "error": re.compile(r"pgsvd-vllm: (error: )?|ERROR:\S+:|Traceback "),
}
# What moves the cursor between bars in several lines.
_MOVE = re.compile(r"\x1b\[A")


def add_log(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is printed."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="print results, warnings and errors alone")
    group.add_argument(
        "--log-format",
        choices=["text", "json"],
        default="text",
        help="json: every line of the running command is an object with time, level and message; a progress bar's "
        "states have level progress with stage, done, total and seconds",
    )


def say(line: str) -> None:
    """Print a progress line with the flags of its options; with --quiet only a warning."""
    for part in with_flags(line).splitlines():
        if part.startswith(WARNING) or not getattr(sys.stdout, "is_quiet", False):
            print(part, flush=True)


@contextmanager
def settings_restored(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Restore what `output_streams` sets in the environment."""
    before = {name: environment.get(name) for name in _SETTINGS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value


def output_streams(arguments: argparse.Namespace) -> tuple[Output, Output]:
    """Standard output and error as a command's options ask for them.

    Call it before tqdm is imported, which reads its settings from the environment then.
    """
    as_json = getattr(arguments, "log_format", "text") == "json"
    in_terminal = sys.stderr.isatty() and not as_json
    if not in_terminal:
        os.environ.setdefault("TQDM_MININTERVAL", BAR_SECONDS)
    if as_json:
        os.environ["TQDM_BAR_FORMAT"] = _BAR_FORMAT
    if getattr(arguments, "quiet", False):
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    output: Output = JsonLines(sys.stdout) if as_json else Output(sys.stdout)
    errors: Output = JsonLines(sys.stderr) if as_json else Lines(sys.stderr)
    if in_terminal:
        errors = Output(sys.stderr, "\n\t\r")
    # What a dry run prints is its result.
    output.is_quiet = getattr(arguments, "quiet", False) and not getattr(arguments, "dry_run", False)
    return output, errors


class JsonLines(Output):
    """A stream whose lines are JSON objects.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._line = ""
        self._level: str | None = None  # of the text whose last line waits for its end

    def write(self, text: str) -> int:
        """Write the lines that are complete, and every state of a progress bar as it comes."""
        level = self._level
        *lines, self._line = re.split(r"[\r\n]", self._line + _MOVE.sub("", text))
        for line in lines:
            level = self._write_line(line, level)
        self._level = level if self._line else None
        if self._line.count(_FIELD) == _BAR_FORMAT.count(_FIELD):
            self.end()
        return len(text)

    def end(self) -> None:
        """Write what has no end of line."""
        self._write_line(self._line, self._level)
        self._line, self._level = "", None

    def _write_line(self, line: str, level: str | None) -> str | None:
        """Write a line or a bar's state; returns its level, which the next lines of the same text share."""
        line = line.strip()
        if _FIELD in line:
            self._write_bar(line.split(_FIELD))
        elif line:
            found = next((name for name, begin in _LEVELS.items() if begin.match(line)), None)
            if found is not None and (level is None or level == found):
                line = re.sub(r"^(WARNING: |pgsvd-vllm: (error: )?)", "", line)
            level = level or found or "info"
            self._write_object({"level": level, "message": line})
        return level

    def _write_bar(self, fields: list[str]) -> None:
        if len(fields) == _BAR_FORMAT.count(_FIELD) + 1:
            stage, done, total, seconds = fields
            numbers = {"done": _number(done), "total": _number(total), "seconds": _number(seconds)}
            self._write_object({"level": "progress", "stage": stage.strip(": "), **numbers})

    def _write_object(self, found: dict[str, object]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        super().write(json.dumps({"time": now, **found}) + "\n")


def _number(text: str) -> float | int | None:
    """A number as tqdm prints it; None for an unknown total, or what is no number."""
    try:
        value = round(float(text), 1)
    except ValueError:
        return None
    return int(value) if value.is_integer() else value
