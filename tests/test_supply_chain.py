"""Locked packages, the audit of them, no unpickling, and no network unless a command is asked for it."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)(?: ;[^\\]*)?(?: \\)?$", re.MULTILINE)
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}(?: \\)?$")
PRODUCT = sorted(path for name in ("pgsvd_vllm", "offline", "kernels") for path in (ROOT / name).rglob("*.py"))
# Modules that run code from data, or that open connections; hubs are reached through their own libraries.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK = {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc", "websockets"}
CALLS = {"eval", "exec", "compile", "torch.load", "torch.hub.load", "numpy.load", "np.load"}

# What of yaml makes plain values alone.
SAFE_YAML = {"safe_load", "safe_dump", "compose", "SafeLoader", "Node", "MappingNode", "YAMLError"}

# Records every address that is looked up or connected to, but for this machine's, and lets none through.
GUARD = """
import json, os, sys
attempts = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        local = isinstance(address, str) and event == "socket.connect"  # a socket of the file system
        if not local and host not in ("127.0.0.1", "::1", "localhost", None):
            attempts.append(str(host))
            raise OSError(f"no network: {host}")
sys.addaudithook(guard)
"""


def pins(lock: Path) -> dict[str, str]:
    """Canonical name -> version of a lock file."""
    return {canonicalize_name(m["name"]): m["version"] for m in PIN.finditer(lock.read_text(encoding="utf-8"))}


def load_audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pgsvd_audit", ROOT / "packaging" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guarded(code: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run code in a process without a network that nothing was told to be offline; the hosts it asked for."""
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"}
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    finish = "\nprint('ATTEMPTS', json.dumps(attempts))\n"
    done = subprocess.run(
        [sys.executable, "-c", GUARD + code + finish],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=600,
        env=environment | {"HF_HUB_DISABLE_TELEMETRY": "0"},
        check=False,
    )
    found = re.findall(r"^ATTEMPTS (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stderr
    return done, json.loads(found[-1])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_hashes(lock: Path) -> None:
    lines = lock.read_text(encoding="utf-8").splitlines()
    assert lines
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert HASH.match(line) or PIN.match(line), line
        if PIN.match(line):
            assert HASH.match(following), line


def test_locked_versions_are_in_pyprojects_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in ("cpu", "eval", "plot", "dev") for line in extras[name])]
    locked = pins(ROOT / "requirements" / "dev.lock")
    missed = []
    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missed.append(f"{requirement}: locked {version}; run make lock")
    assert missed == []


def test_direct_dependencies_that_break_have_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounded = {r.name for r in map(Requirement, project["dependencies"]) if "<" in str(r.specifier)}
    assert {"torch", "transformers"} <= bounded
    assert [str(Requirement(line).specifier) for line in project["optional-dependencies"]["cpu"]] == ["==0.32.0"]


def package(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": [], **more}


def test_the_audit_fails_unless_every_package_was_looked_up() -> None:
    verdict = load_audit().verdict
    skipped = {"name": "b", "skip_reason": "not found"}
    lines, status = verdict({"dependencies": [package("a"), package("c")]})
    assert (lines, status) == (["audit: 2 packages, no known vulnerability"], 0)
    lines, status = verdict({"dependencies": [skipped, skipped]})
    assert status == 1
    assert len(lines) == 1
    assert "does not answer" in lines[0]
    assert verdict({"dependencies": [package("a"), skipped]}) == (["audit: not looked up: b"], 1)
    known = package("a", vulns=[{"id": "CVE-1", "fix_versions": ["1.1"]}, {"id": "CVE-2", "fix_versions": []}])
    lines, status = verdict({"dependencies": [known, package("c")]})
    assert status == 1
    assert lines == ["audit: a 1.0: CVE-1, fixed in 1.1", "audit: a 1.0: CVE-2, fixed in no version"]


def unsafe_names(path: Path) -> list[str]:
    """What a file imports or calls that runs code from data or opens connections."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml" and node.attr not in SAFE_YAML:
            found.append(f"yaml.{node.attr}")
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE | NETWORK]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE | NETWORK | {"yaml"}:
            found.append(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(ast.unparse(node.func))
    return [f"{path.relative_to(ROOT)}: {name}" for name in found]


def test_no_file_unpickles_or_opens_connections() -> None:
    assert [name for path in PRODUCT for name in unsafe_names(path)] == []
    assert unsafe_names(ROOT / "tests" / "support" / "server.py")  # it uses urllib


@pytest.mark.parametrize("code", ["import yaml\nyaml.load(x, Loader=yaml.Loader)", "from yaml import load"])
def test_other_loaders_of_yaml_are_found(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "a.py").write_text(code)
    assert unsafe_names(tmp_path / "a.py")


def test_a_local_model_needs_no_network(tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    command = ["compress", str(tiny_model), "-o", output, "--ratio", "0.25"]
    command += ["--num-calibration-samples", "8", "--max-seq-length", "64"]
    done, attempts = guarded(f"""
from pgsvd_vllm.cli import main
status = main({command!r}) or main(["verify", {output!r}]) or main(["inspect", {output!r}])
import pgsvd_vllm.hf
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({output!r})
print("STATUS", status)
""")
    assert "STATUS 0" in done.stdout, done.stderr
    assert attempts == []


def test_a_hub_id_asks_for_the_network(tmp_path: Path) -> None:
    command = ["compress", "no-such-owner/no-such-model", "-o", str(tmp_path / "out")]
    done, attempts = guarded(f"""
from pgsvd_vllm.cli import main
print("STATUS", main({command!r}))
""")
    assert "STATUS 2" in done.stdout, done.stderr
    assert attempts


def test_the_makefile_turns_telemetry_off() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "export HF_HUB_DISABLE_TELEMETRY = 1\n" in text
    assert "export VLLM_NO_USAGE_STATS = 1\n" in text
