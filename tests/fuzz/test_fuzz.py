"""The generator of damage and the program that counts what readers do with it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from benchmarks.reliability import fuzz
from benchmarks.reliability.fuzz import HangError, Tally, damaged, limited, rows_of, run_case
from benchmarks.reliability.mutations import change_length, damage_bytes, damage_header, damage_json, flip_bits
from benchmarks.reliability.targets import BadMessageError, Outcome, Target, checkpoint_targets, refusal
from pgsvd_vllm.errors import CheckpointError

SAMPLE = json.dumps({"a": {"rank": 3, "form": "pivot"}, "b": [1, 2.5, "text", None]}).encode()


def tallied(read: Callable[[bytes], Outcome], cases: int = 100) -> Tally:
    """What the fuzzer finds in a reader of JSON."""
    tally = Tally()
    for number in range(cases):
        run_case(Target("planted", SAMPLE, damage_json, read), 0, number, tally)
    return tally


def all_ok(tally: Tally) -> bool:
    return all(row["ok"] for row in rows_of({"planted": tally}, 1.0))


@pytest.mark.parametrize("damage", [damage_bytes, damage_json, flip_bits, change_length])
def test_a_seed_names_its_damage(damage: Callable[[bytes, Random], bytes]) -> None:
    found = [damage(SAMPLE, Random(seed)) for seed in range(200)]
    assert found == [damage(SAMPLE, Random(seed)) for seed in range(200)]
    assert sum(data != SAMPLE for data in found) > 150
    assert len(set(found)) > 15


def test_damaged_headers_keep_their_length(tmp_path: Path) -> None:
    target = next(t for t in checkpoint_targets(tmp_path) if t.name == "header")
    body = target.sample[8 + int.from_bytes(target.sample[:8], "little") :]
    formed = 0
    for number in range(200):
        data = damaged(target, 0, number)
        assert data == damage_header(target.sample, Random(f"0:header:{number}"))
        assert data.endswith(body)
        formed += data[8 + int.from_bytes(data[:8], "little") :] == body
    assert 100 < formed < 200


def test_a_careful_reader_passes() -> None:
    def read(data: bytes) -> Outcome:
        try:
            same = json.dumps(json.loads(data)).encode() == SAMPLE
        except ValueError as error:
            return refusal(CheckpointError(f"not JSON ({type(error).__name__})"))
        return Outcome.EQUAL if same else refusal(CheckpointError("another document"))

    tally = tallied(read)
    assert all_ok(tally)
    assert tally.outcomes[Outcome.REFUSED] > 80
    assert tally.outcomes.total() == 100


def test_a_careless_reader_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    tally = tallied(lambda data: Outcome.EQUAL if json.loads(data)["a"]["rank"] > 0 else Outcome.REFUSED)
    assert {"KeyError", "TypeError"} <= {type(error).__name__ for _, error in tally.failures}
    assert not all_ok(tally)
    fuzz.show_failures(Target("planted", SAMPLE, damage_json, refusal), 0, tally)
    shown = capsys.readouterr().out
    assert "KeyError at" in shown
    assert f"--seed 0 --target 'planted' --case {tally.failures[0][0]}" in shown


def test_other_content_is_found() -> None:
    tally = tallied(lambda data: Outcome.EQUAL if data == SAMPLE else Outcome.DIFFERENT)
    assert tally.outcomes[Outcome.DIFFERENT] == len(tally.different) > 80
    assert not all_ok(tally)


def test_slow_and_large_inputs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "TIME_BAR", 0.1)
    monkeypatch.setattr(fuzz, "MEMORY_BAR", 20)
    with pytest.raises(HangError), limited(0.05):
        time.sleep(5)

    def slow(data: bytes) -> Outcome:
        time.sleep(5)
        return Outcome.REFUSED

    tally = tallied(slow, cases=1)
    assert isinstance(tally.failures[0][1], HangError)
    assert not all_ok(tally)
    # Above any peak of this process so far.
    size = int(fuzz.peak_memory()) * 2**20
    tally = tallied(lambda data: Outcome.REFUSED if b"x" * size else Outcome.EQUAL, cases=1)
    assert tally.memory > 20
    assert not all_ok(tally)


@pytest.mark.parametrize("message", ["", " \n"])
def test_a_message_no_user_can_read_is_found(message: str) -> None:
    with pytest.raises(BadMessageError):
        refusal(CheckpointError(message))


def test_one_case_is_shown_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--target", "file length", "--case", "3"])
    assert fuzz.main() == 0
    assert "refused with one line" in capsys.readouterr().out
