"""Private names of transformers stay in one file, and do what that file says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pgsvd_vllm.hf.transformers_compat import skeleton, tied_weights
from tests.conftest import ROOT, save_tiny_model

HOME = ROOT / "pgsvd_vllm" / "hf" / "transformers_compat.py"
# The documented ways to extend transformers.
PUBLIC = {
    *("transformers", "transformers.quantizers", "transformers.quantizers.base"),
    "transformers.utils.quantization_config",
}
PRIVATE_ATTRIBUTES = {
    *("all_tied_weights_keys", "_get_dtype_plan", "_hf_peft_config_loaded", "_is_hf_initialized", "_tied_weights_keys")
}


def test_private_names_are_in_one_file() -> None:
    files = [path for name in ("pgsvd_vllm", "offline") for path in (ROOT / name).rglob("*.py") if path != HOME]
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.split(".")[0] == "transformers":
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                wrong += [f"{path.name}: {module}"] if module not in PUBLIC or private else []
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
                wrong.append(f"{path.name}: {node.attr}")
            if isinstance(node, ast.Constant) and node.value in PRIVATE_ATTRIBUTES:
                wrong.append(f"{path.name}: {node.value}")
    assert wrong == []


def test_a_skeleton_has_no_weights_and_true_buffers(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    model = skeleton(AutoModelForCausalLM, config, torch.float32, trust_remote_code=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    expected = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_buffers())
    assert expected
    assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())


def test_tied_heads_are_known(tiny_model: Path, tmp_path: Path) -> None:
    untied = save_tiny_model(tmp_path / "untied", tie=False, layers=1)
    found = [tied_weights(AutoModelForCausalLM.from_pretrained(folder)) for folder in (tiny_model, untied)]
    assert dict(found[0]) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert dict(found[1]) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "packages", [("transformers==5.16.1", "huggingface-hub==1.31.0"), ("transformers==5.20.2",)], ids=" ".join
)
def test_the_ends_of_the_range_of_transformers(packages: tuple[str, ...], tmp_path: Path) -> None:
    """The oldest version, and the newest that vLLM 0.33 accepts, compress, load and run."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *packages]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(packages)} cannot be downloaded: {done.stderr[-300:]}")
    code = "import sys, pytest, transformers; print(transformers.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    files = [str(ROOT / "tests" / "hf"), str(ROOT / "tests" / "offline" / "test_compress.py")]
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", *files],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.startswith(packages[0].partition("==")[2])
