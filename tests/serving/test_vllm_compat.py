"""What is imported from vLLM, and the MLPs whose activation is taken over, in the sources of every version."""

import ast
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed")

from pgsvd_vllm.families import SILU_MLPS

# All that such a forward may touch: nothing else sees the gate and up layer's outputs.
OF_AN_MLP = {"gate_up_proj", "act_fn", "down_proj", "w2", "c_proj", "expert_gate"}


@pytest.fixture(scope="session")
def next_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of vLLM 0.33, unpacked and not installed."""
    folder = tmp_path_factory.mktemp("vllm-0.33")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "vllm==0.33.0", "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        pytest.skip(f"vLLM 0.33 cannot be downloaded: {done.stderr[-300:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    return folder / "vllm"


@pytest.fixture(params=["installed", pytest.param("0.33", marks=pytest.mark.slow)])
def sources(request: pytest.FixtureRequest) -> Path:
    if request.param == "0.33":
        return request.getfixturevalue("next_vllm")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def imports() -> Iterator[tuple[str, str]]:
    """(module, name) of every `from vllm... import name` of the package."""
    for path in sorted((ROOT / "pgsvd_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                yield from ((node.module, alias.name) for alias in node.names)


def module_file(sources: Path, module: str) -> Path | None:
    path = sources.joinpath(*module.split(".")[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def defined(file: Path) -> set[str]:
    """The names that a module has, as far as its text tells."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # modules that import on demand name what they have
    return names


def test_imported_names_are_there(sources: Path) -> None:
    wanted = set(imports())
    assert len(wanted) > 15
    missing = []
    for module, name in sorted(wanted):
        file = module_file(sources, module)
        if file is None or (name not in defined(file) and module_file(sources, f"{module}.{name}") is None):
            missing.append(f"{module}.{name}")
    assert missing == []


@pytest.mark.parametrize("name", sorted(SILU_MLPS))
def test_mlps_whose_activation_is_taken_do_nothing_else_with_it(name: str, sources: Path) -> None:
    module, _, kind = name.rpartition(".")
    file = module_file(sources, module)
    assert file is not None
    (body,) = (
        n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.ClassDef) and n.name == kind
    )
    (forward,) = (n for n in body.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    used = [n for n in ast.walk(forward) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"]
    assert {attribute.attr for attribute in used} <= OF_AN_MLP
    assert [attribute.attr for attribute in used].count("act_fn") == 1
