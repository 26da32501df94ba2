"""Signals end a command with the sentence that tells how to continue; the second one ends it at once."""

import signal
import subprocess
import sys
import time

import pytest

from pgsvd_vllm.cli.stop import SIGNALS

# A command that waits in Python, and one inside compiled code that runs no signal handlers.
WAIT = """
import sys, time, signal
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT): signal.signal(number, signal.default_int_handler)
import pgsvd_vllm.cli as cli
def run(arguments):
    print("ready", flush=True)
    {work}
    return 0
cli.COMMANDS["env"].run = run
sys.exit(cli.main(["env"]))
"""
# Short waits: one long one would not end if the signal came just before it.
PYTHON = "[time.sleep(0.01) for _ in range(6000)]"
COMPILED = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**8)"


# An interruption that compiled code loses inside a callback, and the error that it raises instead.
LOST = """
    import os
    from pgsvd_vllm.errors import InputError
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except KeyboardInterrupt:
        pass
    raise {error}("a size")
"""


def started(work: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT.format(work=work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_with_advice_and_its_status(number: signal.Signals) -> None:
    process = started(PYTHON)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, "pgsvd-vllm: interrupted; repeat the command\n")


@pytest.mark.parametrize("error", ["InputError", "TypeError"])
def test_an_error_in_the_place_of_an_interruption_is_one(error: str) -> None:
    _, errors = (process := started(LOST.format(error=error))).communicate(timeout=30)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "pgsvd-vllm: interrupted; repeat the command\n")


def test_the_second_signal_ends_compiled_code_at_once() -> None:
    process = started(COMPILED)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "nothing was left to end"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert errors == "\npgsvd-vllm: interrupted again, ended at once; repeat the command\n"


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup leaves SIGHUP."""
    code = WAIT.replace("import pgsvd", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nimport pgsvd")
    command = [sys.executable, "-c", code.format(work="time.sleep(1)")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_handlers_are_given_back() -> None:
    from pgsvd_vllm.cli import main

    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert main(["env"]) == 0
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
