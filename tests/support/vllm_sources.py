"""The sources of the vLLM versions that the plugin supports, read without importing them."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from tests.support import reference_model

NEXT = "0.33.0"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def installed() -> Path:
    """The package folder of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def next_version() -> Path:
    """The package folder of vLLM NEXT, of Python files alone; downloaded once (336 MB), then in the user's cache.

    Raises:
        subprocess.CalledProcessError: pip cannot download the wheel; stderr says why.
    """
    target = reference_model.cache_folder() / f"vllm-{NEXT}-sources"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                wanted = [f"vllm=={NEXT}", "--no-deps", "--only-binary", ":all:", "-d", scratch]
                # A wheel for GPUs, whatever this machine is.
                wanted += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
                subprocess.run(
                    [sys.executable, "-m", "pip", "download", "-q", *wanted],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=900,
                )
                (wheel,) = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(f"{scratch}/src", [n for n in archive.namelist() if n.endswith(".py")])
                shutil.move(f"{scratch}/src", target)
    return target / "vllm"


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Every node of a file."""
    return tuple(ast.walk(parsed(file)))


@dataclass(frozen=True)
class Found:
    """A class or function and the module that defines it."""

    module: str
    node: Definition


@dataclass(frozen=True)
class Sources:
    """A vLLM package folder, whose definitions are found by name."""

    root: Path

    def file(self, module: str) -> Path | None:
        """The file of a module of vLLM."""
        path = self.root.joinpath(*module.split(".")[1:])
        return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)

    def find(self, module: str, name: str) -> Found | None:
        """The class or function of a name, followed through re-exports; of several definitions the last."""
        file = self.file(module)
        if file is None:
            return None
        found: Found | None = None
        for node in nodes(file):
            if isinstance(node, Definition) and node.name == name and node in parsed(file).body:
                found = Found(module, node)
        if found is not None:
            return found
        for node in nodes(file):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        origin = self._absolute(module, file, node)
                        found = self.find(origin, name if alias.name == "*" else alias.name)
                        if found is not None:
                            return found
        return None

    @staticmethod
    def _absolute(module: str, file: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def classes(self, found: Found) -> Iterator[Found]:
        """A class and its bases in vLLM, nearest first."""
        assert isinstance(found.node, ast.ClassDef)
        yield found
        for base in found.node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            parent = self.find(found.module, base.id) if isinstance(base, ast.Name) else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                yield from self.classes(parent)

    def method(self, found: Found, name: str) -> ast.FunctionDef | None:
        """A method of a class or of its bases; of overloads the last."""
        for one in self.classes(found):
            assert isinstance(one.node, ast.ClassDef)
            for node in reversed(one.node.body):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return node
        return None

    def attributes(self, found: Found) -> set[str]:
        """The names that instances of a class have: set in a method, declared, defined, or registered."""
        names: set[str] = set()
        for one in self.classes(found):
            assert isinstance(one.node, ast.ClassDef)
            for node in one.node.body:
                if isinstance(node, ast.FunctionDef):
                    names.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
                elif isinstance(node, ast.Assign):
                    names.update(target.id for target in node.targets if isinstance(target, ast.Name))
            for inner in ast.walk(one.node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                        names.add(inner.attr)
                elif isinstance(inner, ast.Call) and getattr(inner.func, "attr", "").startswith("register_"):
                    names.update(str(a.value) for a in inner.args[:1] if isinstance(a, ast.Constant))
        return names
