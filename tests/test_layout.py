"""The layout keeps its promises: light import, one-way dependencies, no clash with other packages."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SERVING = (
    *("plugin", "config", "loader", "linear", "products", "triton_products", "profile", "sharding"),
    *("experts", "head"),
)


def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    prefix = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    return subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, cwd="/", check=False)


def test_importing_the_package_is_light() -> None:
    done = python("import pgsvd_vllm; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "offline").glob("*.py")), ids=lambda p: p.name)
def test_offline_does_not_know_serving(path: Path) -> None:
    assert "vllm" not in roots(path)
    assert not imported(path) & {f"pgsvd_vllm.{name}" for name in SERVING}


@pytest.mark.parametrize("name", [*SERVING, "checkpoint", "costs", "hf", "stored_names", "unstack_experts"])
def test_serving_and_format_do_not_know_offline(name: str) -> None:
    found = imported(ROOT / "pgsvd_vllm" / f"{name}.py")
    assert not any(module.startswith("pgsvd_vllm.offline") for module in found)
    if name in ("checkpoint", "costs", "hf", "sharding", "stored_names", "unstack_experts"):
        assert "vllm" not in {module.split(".")[0] for module in found}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    others = {name for name in imported(path) if not name.startswith("pgsvd_vllm.kernels.")}
    assert {name.split(".")[0] for name in others} - sys.stdlib_module_names <= {"torch", "triton"}


def test_a_foreign_kernels_package_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("ORIGIN = 'foreign'\n")
    # The checkout comes first on the path: only the missing __init__.py lets the other package win.
    done = python("import kernels; print(kernels.ORIGIN); import pgsvd_vllm.kernels.reference", ROOT, tmp_path)
    assert done.stdout.strip() == "foreign", done.stderr
    assert not list((ROOT / "kernels").glob("__init__.py")) + list((ROOT / "offline").glob("__init__.py"))


def test_offline_works_without_vllm(tiny_model: Path, tmp_path: Path) -> None:
    blocker = (
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'vllm': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from pgsvd_vllm.cli import main\n"
    )
    command = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--tolerance", "0.3"]
    command += ["--num-calibration-samples", "16", "--max-seq-length", "64"]
    done = python(blocker + f"sys.exit(main({command!r}) or main(['verify', {str(tmp_path / 'out')!r}]))")
    assert done.returncode == 0, done.stderr
    assert "all numbers finite" in done.stdout


def folders_below(root: Path, levels: int) -> set[str]:
    """A folder of the repository and those below it that hold files."""
    found = {root.relative_to(ROOT).as_posix()}
    for folder in sorted(root.iterdir()) if levels else ():
        if folder.is_dir() and any(path.suffix in (".py", ".md") for path in folder.rglob("*")):
            found |= folders_below(folder, levels - 1)
    return found


def test_the_architecture_document_names_every_folder() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = document.split("\n```\n")[1].splitlines()
    named = [line.split()[0].rstrip("/") for line in tree]
    assert all(len(line.split()) >= 3 for line in tree)  # says what the folder is for
    # Folders of tests mirror the others: the first level of them is named.
    levels = {"pgsvd_vllm": 9, "offline": 9, "kernels": 9, "benchmarks": 9, "tests": 1, "docs": 9}
    existing = set().union(*(folders_below(ROOT / name, depth) for name, depth in levels.items()))
    assert sorted(named) == sorted(existing)


def test_documents_name_files_that_exist() -> None:
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    # docs/architecture.md shortens paths below these.
    bases = [ROOT, *(ROOT / name for name in ("pgsvd_vllm", "offline", "tests", "docs"))]
    pattern = re.compile(r"(?<![\w/.~-])(?:[\w-]+/)+[\w-]+\.(?:py|md|json|png)\b")
    named = {(path.name, name) for path in documents for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 50
    assert not [pair for pair in sorted(named) if not any((base / pair[1]).is_file() for base in bases)]
