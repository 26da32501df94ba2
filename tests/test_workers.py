"""pytest's workers have their own cores and share what is computed once; a failed test names its command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SUITE = """
import os, time
from pathlib import Path

import pytest
import torch

from tests.conftest import WORKER, made_once

OUT = Path(__file__).parent

@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    def make(folder):
        time.sleep(0.5)
        folder.mkdir()
        (OUT / f"made-{WORKER}").touch()
    return made_once(tmp_path_factory, "shared", make)

@pytest.mark.parametrize("name", ["a b", "c", "d"])
def test_each(name, shared):
    assert shared.is_dir()
    cores = os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")
    assert torch.get_num_threads() == len(cores) == int(os.environ["OMP_NUM_THREADS"])
    for core in cores:
        (OUT / f"core-{core}-{WORKER}").touch()
    (OUT / f"file-{Path(__file__).stem}-{WORKER}").touch()
    time.sleep(0.5)
    assert name != "a b"
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small suite and its output, after a run by two workers."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    folder = tmp_path_factory.mktemp("suite")
    for name in ("test_one.py", "test_other.py"):
        (folder / name).write_text(SUITE, encoding="utf-8")
    options = ("-p", "tests.conftest", "-n", "2", "-p", "no:cacheprovider", "--rootdir", folder)
    # The workers that run this are none of the suite's own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, options), folder],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=False,
    )
    assert "2 failed, 4 passed" in done.stdout, done.stdout + done.stderr
    return folder, done.stdout


def test_a_failed_test_names_its_command(suite: tuple[Path, str]) -> None:
    lines = suite[1].splitlines()
    for file in ("test_one.py", "test_other.py"):
        assert f".venv/bin/python -m pytest '{file}::test_each[a b]'" in lines
    assert sum(line.startswith(".venv/bin/python -m pytest") for line in lines) == 2


def test_workers_make_a_shared_folder_once(suite: tuple[Path, str]) -> None:
    assert len(list(suite[0].glob("made-*"))) == 1


def test_workers_have_cores_of_their_own(suite: tuple[Path, str]) -> None:
    used = [path.name.split("-")[1:] for path in suite[0].glob("core-*")]
    assert {worker for _, worker in used} == {"gw0", "gw1"}
    assert len({core for core, _ in used}) == len(used)


def test_one_worker_runs_the_tests_of_a_file(suite: tuple[Path, str]) -> None:
    ran = [path.name.split("-")[1:] for path in suite[0].glob("file-*")]
    assert sorted(file for file, _ in ran) == ["test_one", "test_other"]
