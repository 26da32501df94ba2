"""transformers loads factored checkpoints with the import, fails without it, and saves the same checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.studies.bf16_logits import reconstruct_dense
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.reader import open_checkpoint, read_index
from pgsvd_vllm.format.schema import INDEX_NAME, LOAD_GUARD
from pgsvd_vllm.hf import quantizer
from tests.conftest import save_tiny_model
from tests.e2e.checkpoints import truncated, write_checkpoint


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with untied embeddings, biases, and both dense and factored projections."""
    folder = tmp_path_factory.mktemp("biased")
    dense = save_tiny_model(folder / "dense", bias=True, tie=False, seed=5)
    return write_checkpoint(
        dense, folder / "out", lambda module, weight: None if "k_proj" in module else truncated(weight, 21)
    )


@pytest.fixture(params=["tied", "untied-bias"])
def checkpoint(request: pytest.FixtureRequest, tiny_compressed: Path, biased: Path) -> Path:
    return tiny_compressed if request.param == "tied" else biased


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = {info.file for info in read_index(folder, INDEX_NAME).values()}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def remove_tensor(source: Path, target: Path, tensor: str) -> Path:
    """A copy of the checkpoint without a tensor, which neither file nor index contains."""
    shutil.copytree(source, target)
    index = json.loads((target / INDEX_NAME).read_text())
    path = target / index["weight_map"].pop(tensor)
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path, metadata={"format": "pt"})
    (target / INDEX_NAME).write_text(json.dumps(index))
    return target


def test_loaded_weights_equal_the_stored_ones(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    state = model.state_dict()
    for name, tensor in stored_tensors(checkpoint).items():
        assert torch.equal(state[name], tensor), name
    modules = dict(model.named_modules())
    table = open_checkpoint(checkpoint).modules
    for name, row in table.items():
        assert type(modules[name]) is quantizer.MODULES[row.form]
    classes = tuple(quantizer.MODULES.values())
    assert {name for name, module in modules.items() if isinstance(module, classes)} == table.keys()


def test_auto_model_has_the_same_weights(checkpoint: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(checkpoint).model.state_dict()
    body = AutoModel.from_pretrained(checkpoint).state_dict()
    assert whole.keys() == body.keys()
    assert any(name.endswith(("weight_v", "weight_p")) for name in body)
    for name, tensor in body.items():
        assert torch.equal(tensor, whole[name]), name


@torch.no_grad()
def test_logits_equal_those_of_the_reconstructed_model(checkpoint: Path) -> None:
    factored = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = LlamaConfig.from_pretrained(checkpoint)
    for key in ("quantization_config", "transformers_weights"):
        if hasattr(config, key):
            delattr(config, key)

    def dense_logits(dtype: torch.dtype) -> torch.Tensor:
        dense = LlamaForCausalLM(config).to(dtype).eval()
        missing, unexpected = dense.load_state_dict(reconstruct_dense(checkpoint, torch.float32), strict=False)
        assert unexpected == []
        assert set(missing) <= {"lm_head.weight"}
        dense.tie_weights()
        return dense(ids).logits.double()

    ids = torch.randint(2, 258, (4, 40), generator=torch.Generator().manual_seed(2))
    exact = dense_logits(torch.float64)
    # The error of the dense model by float32 rounding. A factored layer rounds twice where a dense one rounds once,
    # hence the factor 2; another factor 2 since the maximum of 41280 values varies.
    rounding = (dense_logits(torch.float32) - exact).abs().max()
    error = (factored(ids).logits.double() - exact).abs().max()
    assert 0 < rounding < 1e-4
    assert error <= 4 * rounding


def test_save_pretrained_writes_the_same_checkpoint_again(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "again")
    before, after = stored_tensors(checkpoint), stored_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    first, second = open_checkpoint(checkpoint), open_checkpoint(tmp_path / "again")
    assert second.quantization_config == first.quantization_config
    assert second.config["transformers_weights"] == LOAD_GUARD

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reloaded[name]), name


def test_save_pretrained_in_several_files(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "again", max_shard_size="300KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert open_checkpoint(tmp_path / "again").modules == open_checkpoint(checkpoint).modules
    before, after = stored_tensors(checkpoint), stored_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


PLAIN_LOAD = """
import sys, transformers
for folder in sys.argv[2:]:
    try:
        getattr(transformers, sys.argv[1]).from_pretrained(folder)
    except Exception as error:
        print("refused", type(error).__name__, " ".join(str(error).split()))
    else:
        print("LOADED", folder)
"""


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel"])
def test_loading_fails_without_the_import(auto_class: str, tiny_compressed: Path, tmp_path: Path) -> None:
    """transformers must not initialise the projections at random with a mere warning."""
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(tiny_compressed).save_pretrained(again)
    folders = [str(tiny_compressed), str(again)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_LOAD, auto_class, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr
    for line in lines:
        assert line.startswith("refused"), done.stdout
        # The message must name the missing import.
        assert "pgsvd_vllm.hf" in line, done.stdout


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_missing_factor_is_named(auto_class: type, place: int, checkpoint: Path, tmp_path: Path) -> None:
    module, row = sorted(open_checkpoint(checkpoint).modules.items())[3]
    suffix = row.suffixes[place]
    broken = remove_tensor(checkpoint, tmp_path / "broken", f"{module}.{suffix}")
    with pytest.raises(CheckpointError, match=rf"{module}\.{suffix} is missing"):
        auto_class.from_pretrained(broken)


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_dense_tensor_is_named(tensor: str, biased: Path, tmp_path: Path) -> None:
    broken = remove_tensor(biased, tmp_path / "broken", tensor)
    with pytest.raises(CheckpointError, match=rf"tensor {tensor} is missing"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_auto_model_names_a_missing_dense_tensor(biased: Path, tmp_path: Path) -> None:
    broken = remove_tensor(biased, tmp_path / "broken", "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"tensor (model\.)?norm\.weight is missing"):
        AutoModel.from_pretrained(broken)
    # The model without LM head does not need that tensor.
    headless = remove_tensor(biased, tmp_path / "headless", "lm_head.weight")
    config = json.loads((headless / "config.json").read_text())
    config["quantization_config"]["tensors"] -= 1
    (headless / "config.json").write_text(json.dumps(config))
    assert AutoModel.from_pretrained(headless).norm.weight.shape == (128,)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 2, r"model\.layers\.2\.\S+ is not a linear layer of LlamaForCausalLM"),
        ("intermediate_size", 192, r"the factors form a .* matrix, LlamaForCausalLM needs"),
    ],
)
def test_a_table_that_does_not_fit_the_model_is_refused(
    biased: Path, tmp_path: Path, key: str, value: int, message: str
) -> None:
    """The table has a module that the model lacks, or the factors have another size."""
    config = json.loads((biased / "config.json").read_text())
    shutil.copytree(biased, tmp_path / "broken")
    config[key] = value
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken")
