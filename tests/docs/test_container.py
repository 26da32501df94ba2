"""packaging/Dockerfile, checked without a registry: its base, its user, its files, and the wheel that it builds."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

from tests.check_wheel import wanted_files
from tests.conftest import ROOT

DOCKERFILE = ROOT / "packaging" / "Dockerfile"
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """The stages of the file, each a list of instructions with their arguments; `ARG`s have their defaults."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[list[Instruction]] = []
    defaults: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        if name == "ARG":
            key, _, value = rest.partition("=")
            defaults[key] = value
            continue
        for key, value in defaults.items():
            rest = rest.replace(f"${{{key}}}", value)
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest.strip()))
    return found


def runs(stage: list[Instruction]) -> list[list[str]]:
    """The words of every command of a stage's RUN instructions."""
    lines = [rest for name, rest in stage if name == "RUN"]
    return [shlex.split(command) for line in lines for command in line.split("&&")]


def test_the_base_image_is_a_vllm_that_the_cuda_extra_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(r for r in map(Requirement, project["optional-dependencies"]["cuda"]) if r.name == "vllm")
    images = {rest.partition(" ")[0] for stage in stages() for name, rest in stage if name == "FROM"}
    (image,) = images  # the wheel is built by the Python that will run it
    assert image.startswith("vllm/vllm-openai:v")
    assert wanted.specifier.contains(image.partition(":v")[2])


def test_it_copies_files_that_exist() -> None:
    copied = [rest.split() for stage in stages() for name, rest in stage if name == "COPY"]
    sources = [source for words in copied if not words[0].startswith("--from=") for source in words[:-1]]
    assert {"pyproject.toml", "pgsvd_vllm", "offline", "kernels"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_it_serves_as_a_user_without_rights() -> None:
    last = stages()[-1]
    names = [name for name, _ in last]
    user = next(rest for name, rest in reversed(last) if name == "USER")
    assert int(user) > 999  # a number, which an orchestrator can check without the image
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert any(
        ["useradd", user] == [words[0], words[words.index("--uid") + 1]] for words in runs(last) if "--uid" in words
    )
    assert json.loads(next(rest for name, rest in last if name == "ENTRYPOINT")) == ["vllm", "serve"]


def test_pip_cannot_replace_what_the_image_has() -> None:
    calls = [
        words for stage in stages() for words in runs(stage) if "pip" in words and {"install", "wheel"} & set(words)
    ]
    assert len(calls) == 2
    assert [words for words in calls if not {"--no-deps", "--constraint"} & set(words)] == []


def test_the_copied_files_make_a_complete_wheel_that_pip_takes(tmp_path: Path) -> None:
    """The commands of both stages, with this Python in place of the image's and without downloads."""
    first, last = stages()
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for words in (rest.split() for name, rest in first if name == "COPY"):
        for name in words[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / words[-1], ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / name, source / name)
    (build,) = runs(first)
    assert build[0] == "python3"
    command = [sys.executable, *(str(wheels) if word == "/wheels" else word for word in build[1:])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert wanted_files() <= set(archive.namelist())
    installed = tmp_path / "installed.txt"
    listed = [sys.executable, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    installed.write_text(subprocess.run(listed, capture_output=True, text=True, check=True).stdout, encoding="utf-8")
    assert re.search(r"^torch==2\.", installed.read_text(encoding="utf-8"), re.MULTILINE)
    (install,) = (words for words in runs(last) if "install" in words)
    options = install[install.index("install") : install.index("--constraint")]
    dry = [
        *(sys.executable, "-m", "pip"),
        *options,
        "--constraint",
        str(installed),
        "--dry-run",
        "--no-index",
        str(wheel),
    ]
    done = subprocess.run(dry, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # All else is there already.
    assert re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE) in ([], ["pgsvd-vllm-0.1.0"])
