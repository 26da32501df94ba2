"""Every benchmark runs as a script from any folder."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
# Packages that are found only once the checkout is in sys.path.
OF_THE_CHECKOUT = {"benchmarks", "tests"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "benchmarks")))
def test_a_script_finds_the_checkout_before_it_imports_from_it(path: Path) -> None:
    found = False
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found = found or ast.unparse(node).startswith("sys.path.insert")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert found or not OF_THE_CHECKOUT & {name.split(".")[0] for name in names}, ast.unparse(node)
