"""Layer-wise Gram matrices against a forward pass of the whole model in float64."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.calibration.gram import LayerGrams, advance, robust_rows
from pgsvd_vllm.offline.model.batch import TOKENS_PER_BATCH, text_batches
from pgsvd_vllm.offline.model.find_projections import find_projections
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.source import ModelSource
from tests.conftest import save_tiny_model
from tests.offline.whole import layer_grams

CPU = torch.device("cpu")


def clipped(x: np.ndarray, most: float = 10.0) -> np.ndarray:
    """The definition of robust clipping, token by token: energy at most ten times the window's lower median."""
    out = np.empty_like(x)
    for w, window in enumerate(x):
        energies = [float((token**2).sum()) for token in window]
        limit = most * sorted(energies)[(len(energies) - 1) // 2]
        for t, token in enumerate(window):
            out[w, t] = token if energies[t] <= limit else token * (limit / energies[t]) ** 0.5
    return out.reshape(-1, x.shape[-1])


def windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(seed))


def stream_all(source: ModelSource, ids: torch.Tensor, dtype: torch.dtype) -> tuple[list[LayerGrams], LayerStream]:
    stream = LayerStream(source, text_batches(ids), CPU, dtype)
    found = []
    for index, row in enumerate(find_projections(source).layers):
        found.append(layer_grams(stream, index, row, ids.numel()))
    return found, stream


def reference_inputs(folder: Path, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Inputs of every linear layer in a float64 forward pass of the transformers model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen: dict[str, np.ndarray] = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0].numpy()}))
    with torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_layerwise_grams_equal_those_of_the_whole_model(tmp_path: Path, bias: bool) -> None:
    folder = save_tiny_model(tmp_path / "model", bias=bias, layers=2, seed=3)
    # 53 does not divide the batch, so the last batch has another number of windows.
    ids = windows(90, 53)
    assert 0 < ids.shape[0] % (TOKENS_PER_BATCH // 53) < ids.shape[0]
    found, _ = stream_all(ModelSource(folder), ids, torch.float32)
    reference = reference_inputs(folder, ids)
    assert len(reference) == 14
    changed = 0
    for layer in found:
        assert layer.tokens == ids.numel()
        grams = {name: total.matrix().numpy() for name, total in layer.sums.items()}
        for name, leader in layer.leader.items():
            rows = clipped(reference[name])
            changed += int(np.abs(rows - reference[name].reshape(rows.shape)).max() > 0)
            gram = rows.T @ rows
            difference = np.linalg.norm(grams[leader] - gram) / np.linalg.norm(gram)
            # Worst case of float32: 14 GEMMs of inner dimension 320 in sequence, and the sum over tokens.
            assert difference <= (14 * 320 + ids.numel()) * 2.0**-24, name
    assert changed, "no token was clipped: clipping was not tested"


def test_projections_with_one_input_share_one_gram_matrix(tiny_model: Path) -> None:
    source = ModelSource(tiny_model)
    found, _ = stream_all(source, windows(4, 40), torch.float32)
    for index, layer in enumerate(found):
        prefix = f"model.layers.{index}."
        groups = {
            "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn.o_proj": ["self_attn.o_proj"],
            "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
        }
        assert layer.leader == {prefix + m: prefix + first for first, members in groups.items() for m in members}
        assert set(layer.sums) == {prefix + first for first in groups}
        for gram in (total.matrix() for total in layer.sums.values()):
            assert gram.dtype == torch.float64
            assert torch.equal(gram, gram.T)


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    peaks = []
    for depth in (2, 6):
        source = ModelSource(save_tiny_model(tmp_path / f"{depth}", layers=depth))
        stream = LayerStream(source, text_batches(windows(3, 32)), CPU, torch.float32)

        def materialised(source: ModelSource = source) -> int:
            return sum(p.numel() for layer in source.layers for p in layer.parameters() if not p.is_meta)

        assert materialised() == 0
        peak = 0
        for index, row in enumerate(find_projections(source).layers):
            for step in advance(stream, index, row, collect=True):
                if isinstance(step, int):
                    one_layer = sum(p.numel() for p in source.layers[index].parameters())
                    assert materialised() == one_layer > 0
                    peak = max(peak, materialised())
            assert materialised() == 0
        assert all(p.is_meta for layer in source.layers for p in layer.parameters())
        peaks.append(peak)
    assert peaks[0] == peaks[1]


def test_inputs_of_finished_batches_are_freed(tiny_model: Path) -> None:
    source = ModelSource(tiny_model)
    # Seven batches, all of one size.
    stream = LayerStream(source, text_batches(windows(7 * (TOKENS_PER_BATCH // 64), 64)), CPU, torch.float32)
    live = []
    for step in advance(stream, 0, find_projections(source).layers[0], collect=True):
        if isinstance(step, int):
            gc.collect()
            # type(), since isinstance would import every lazy module among the objects.
            live.append(sum(o.numel() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)))
    assert len(live) == 7
    assert live[-1] <= live[1]


def test_layers_are_freed_after_an_error(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=2)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    # Finite in the file and in bfloat16, but the layer's output overflows.
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    source = ModelSource(folder)
    stream = LayerStream(source, text_batches(windows(2, 16)), CPU, torch.float32)
    expected = r"model\.layers\.0: the layer's output \(first the output of .*down_proj\) overflows in torch\.float32"
    with pytest.raises(InputError, match=expected):
        list(advance(stream, 0, find_projections(source).layers[0], collect=True))
    assert all(p.is_meta for layer in source.layers for p in layer.parameters())
    assert not any(m._forward_pre_hooks for layer in source.layers for m in layer.modules())


def test_a_sink_token_is_clipped() -> None:
    x = torch.randn(3, 21, 16, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 1000
    rows = robust_rows(x).view(3, 21, 16)
    energy = rows.square().sum(-1)
    assert torch.equal(rows[:, 5:], robust_rows(x)[...].view(3, 21, 16)[:, 5:])
    assert torch.equal(rows[:, 1:], x[:, 1:]), "an ordinary token was changed"
    limit = 10 * x.square().sum(-1).median(dim=1).values
    torch.testing.assert_close(energy[:, 0], limit, rtol=1e-5, atol=0)
    # The direction is unchanged.
    assert torch.nn.functional.cosine_similarity(rows[:, 0], x[:, 0]).min() > 1 - 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 20, 21])
def test_robust_rows_match_the_definition(tokens: int) -> None:
    # Log-normal energies: many tokens exceed the limit, and an even number of tokens has two medians.
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(4, tokens, 9, generator=generator) * torch.randn(4, tokens, 1, generator=generator).mul(2).exp()
    rows = robust_rows(x)
    assert rows.dtype == torch.float32
    # A norm, a root and a multiplication in float32.
    np.testing.assert_allclose(rows.numpy(), clipped(x.double().numpy()), rtol=16 * 2.0**-24)


def test_each_window_is_clipped_by_its_own_median() -> None:
    # A window of large activations beside one of small ones is no attention sink.
    x = torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(2))
    x[1] *= 1e3
    assert torch.equal(robust_rows(x), x.flatten(0, 1))


def test_zero_tokens_count_neither_up_nor_down() -> None:
    """Otherwise a window with one nonzero token would have no energy at all."""
    x = torch.zeros(3, 5, 4)
    x[0, 0] = 1
    x[1, :2] = torch.tensor([[1.0], [100.0]])
    for rows in (robust_rows(x), robust_rows(x.bfloat16())):
        rows = rows.view(3, 5, 4)
        assert torch.equal(rows[0], x[0])
        assert torch.equal(rows[1, 0], x[1, 0])
        assert float(rows[1, 1].square().sum()) == pytest.approx(40)
        assert not rows[2].any()


@pytest.mark.parametrize("exponent", [-130, -60, 60, 120])
def test_clipping_works_at_any_magnitude(exponent: int) -> None:
    x = torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(2))
    x[:, 3] *= 50
    x = (x * 2**12).round() / 2**12  # few digits, which denormal numbers keep
    scaled = (x.double() * 2.0**exponent).float()
    torch.testing.assert_close(
        robust_rows(scaled).double() * 2.0**-exponent, robust_rows(x).double(), rtol=1e-4, atol=1e-4
    )


def test_overflowing_inputs_name_the_projection(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", layers=1)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    source = ModelSource(folder)
    stream = LayerStream(source, text_batches(windows(2, 16)), CPU, torch.float32)
    expected = (
        r"mlp\.down_proj: its input \(first the output of model\.layers\.0\.mlp\.up_proj\) overflows in torch\.float32"
    )
    with pytest.raises(InputError, match=expected):
        list(advance(stream, 0, find_projections(source).layers[0], collect=True))
