"""Multi-token prediction: the layers beyond `num_hidden_layers` are kept, and draft tokens for the factored model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.cli import main
from tests.e2e.architectures import ARCHITECTURES, save_model
from tests.e2e.engine import greedy, run_engine, tokens

WIDTH = 128
FIRST = "model.layers.3."  # the model has three layers


def add_mtp_layer(folder: Path) -> dict[str, torch.Tensor]:
    """Give a GLM-4.5 model an MTP layer made from its last one; returns the layer's tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = "model.layers.2."
    layer = {name.replace(last, FIRST): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    layer |= {f"{FIRST}{name}.weight": torch.ones(WIDTH) for name in ("enorm", "hnorm", "shared_head.norm")}
    layer[f"{FIRST}eh_proj.weight"] = torch.randn(WIDTH, 2 * WIDTH, generator=torch.Generator().manual_seed(0)) * 0.08
    layer[f"{FIRST}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    layer[f"{FIRST}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | layer, file, metadata={"format": "pt"})
    return layer


@pytest.mark.slow
@pytest.mark.feature("speculative decoding: multi-token prediction (MTP)")
def test_mtp_layers_are_kept_and_served(tmp_path: Path, one_thread: None) -> None:
    row = next(row for row in ARCHITECTURES if row.name == "GLM-4.5 MoE")
    model = save_model(replace(row, options=row.options | {"num_nextn_predict_layers": 1}), tmp_path / "model")
    layer = add_mtp_layer(model)
    few = ("--num-calibration-samples", "32", "--max-seq-length", "64", "--include", "experts")
    output = tmp_path / "all"
    assert main(["compress", str(model), "-o", str(output), "--ratio", "0.25", "--baseline", "pifa", *few]) == 0
    assert main(["verify", str(output)]) == 0
    written = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in layer.items())

    prompts = torch.randint(2, 258, (8, 9), generator=torch.Generator().manual_seed(1)).tolist()
    job = (prompts, greedy(24))
    drafting = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    assert tokens(run_engine(output, [job], **drafting)[0]) == tokens(run_engine(output, [job])[0])
