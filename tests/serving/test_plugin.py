"""The plugin: found by vLLM, harmless to call twice, harmless without vLLM."""

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

import pgsvd_vllm
from pgsvd_vllm.format.schema import QUANT_METHOD
from pgsvd_vllm.plugin import register

PACKAGE = Path(pgsvd_vllm.__file__).parent
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# Makes `import vllm` fail as on a machine without it, whether or not it is installed here.
WITHOUT_VLLM = """
import importlib.abc, logging, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
logging.basicConfig(level=logging.WARNING)
"""


def run_without_vllm(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_VLLM + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def registered() -> tuple[bool, str]:
    """Whether vLLM knows the method and the load format, and which loader it would take."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.model_loader import get_model_loader

    known = QUANT_METHOD in QUANTIZATION_METHODS and get_quantization_config(QUANT_METHOD).__name__ == "PgsvdConfig"
    return known, type(get_model_loader(LoadConfig(load_format=QUANT_METHOD))).__name__


def register_in_child(connection: multiprocessing.connection.Connection) -> None:
    """What vLLM does in a spawned worker: load the plugins by entry point, twice over."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    register()
    connection.send(registered())
    connection.close()


@needs_vllm
def test_registering_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.pgsvd"):
        register()
        register()
    assert registered() == (True, "PgsvdModelLoader")
    assert [record.message for record in caplog.records if record.name == "vllm.pgsvd"] == []


@needs_vllm
def test_vllm_finds_the_plugin_in_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=register_in_child, args=(child,))
    process.start()
    child.close()
    try:
        assert parent.poll(180), "the spawned process said nothing"
        assert parent.recv() == (True, "PgsvdModelLoader")
    finally:
        process.join(30)
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0


def test_the_entry_point_is_discoverable() -> None:
    found = [
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.value.startswith("pgsvd_vllm")
    ]
    assert [entry.name for entry in found] == ["pgsvd"]
    assert found[0].load() is register


def test_register_without_vllm_warns_and_does_not_raise() -> None:
    done = run_without_vllm("from pgsvd_vllm.plugin import register\nregister()\nregister()\nprint('alive')")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alive\n"
    assert "WARNING:vllm.pgsvd:pgsvd_vllm cannot be used with this vLLM: ModuleNotFoundError" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["env", "inspect", "verify"])
def test_commands_work_without_vllm(command: str, tiny_compressed: Path) -> None:
    arguments = [] if command == "env" else [tiny_compressed]
    done = run_without_vllm("from pgsvd_vllm.cli import main\nsys.exit(main())", command, *arguments)
    assert done.returncode == 0, done.stderr
    wanted = {"env": "torch ", "inspect": "factored projections", "verify": "all numbers finite"}[command]
    assert wanted in done.stdout


def test_transformers_integration_works_without_vllm(tiny_compressed: Path) -> None:
    code = (
        "import pgsvd_vllm.hf, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(sum(type(m).__name__ in ('FactoredLinear', 'PivotLinear') for m in model.modules()) > 0)"
    )
    done = run_without_vllm(code, tiny_compressed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


def vllm_imports() -> list[tuple[str, str, str]]:
    """(file, module, name) of every import from vLLM, at any depth of the code."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                found += [(path.name, node.module or "", alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                found += [(path.name, a.name, "") for a in node.names if a.name.partition(".")[0] == "vllm"]
    return found


@needs_vllm
@pytest.mark.parametrize(("file", "module", "name"), vllm_imports())
def test_every_name_taken_from_vllm_exists(file: str, module: str, name: str) -> None:
    loaded = importlib.import_module(module)
    assert not name or hasattr(loaded, name), f"{file} imports {name} from {module}"


def test_the_scan_for_names_sees_the_imports() -> None:
    """An empty list would let the test above pass without testing."""
    files = {file for file, _, _ in vllm_imports()}
    assert {"plugin.py", "quant_config.py", "model_loader.py", "internals.py"} <= files
