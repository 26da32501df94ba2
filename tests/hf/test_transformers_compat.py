"""Private names of transformers stay in one file, and do what that file says."""

import ast
from pathlib import Path

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
PRIVATE_ATTRIBUTES = {"all_tied_weights_keys", "_get_dtype_plan", "_is_hf_initialized", "_tied_weights_keys"}


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
