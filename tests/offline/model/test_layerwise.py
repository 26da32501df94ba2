"""Layer-wise execution refuses unsupported models and loads no weight twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.compress import compress
from pgsvd_vllm.offline.data.image_text import load_processor, read_pairs
from pgsvd_vllm.offline.model.batch import text_batches
from pgsvd_vllm.offline.model.layerwise import LayerStream
from pgsvd_vllm.offline.model.linear_roles import other_roles
from pgsvd_vllm.offline.model.source import ModelSource
from pgsvd_vllm.offline.model.weights import StoredWeights
from pgsvd_vllm.offline.options import CompressOptions
from tests.e2e.vision_models import VISION_MODELS, save_pairs, save_vision_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda hidden: hidden * 2, id="another tensor"),
        pytest.param(lambda hidden: hidden.mul_(2), id="in place"),
    ],
)
def test_factors_between_layers_are_refused(change: Any, tiny_model: Path) -> None:
    source = ModelSource(tiny_model)
    source.layers[1].register_forward_pre_hook(
        lambda _module, args, kwargs: ((change(args[0] if args else kwargs.pop("hidden_states")), *args[1:]), kwargs),
        with_kwargs=True,
    )
    with pytest.raises(InputError, match="changes the hidden states: this architecture is not supported"):
        LayerStream(source, text_batches(torch.randint(0, 258, (2, 16))), CPU, torch.float32)


def test_in_place_changes_in_vision_language_models_are_refused(tmp_path: Path, one_thread: None) -> None:
    row = next(row for row in VISION_MODELS if row.name == "LLaVA 1.5")
    source = ModelSource(save_vision_model(row, tmp_path / "model"))
    processor = load_processor(source.folder)
    pairs = read_pairs(str(save_pairs(tmp_path / "pairs", 2)), 2, 0, processor, None)

    def change(_module: Any, args: Any, kwargs: Any) -> None:
        (args[0] if args else kwargs["hidden_states"]).mul_(2)

    source.layers[-1].register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(InputError, match="changes the hidden states: this architecture is not supported"):
        other_roles(LayerStream(source, pairs.batches[:1], CPU, torch.float32))


def test_weights_outside_of_the_layers_are_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    row = next(row for row in VISION_MODELS if row.name == "LLaVA 1.5")
    model = save_vision_model(row, tmp_path / "model")
    pairs = str(save_pairs(tmp_path / "pairs", 32))
    loads: Counter[str] = Counter()
    shaped = StoredWeights.shaped

    def counted(self: StoredWeights, name: str, shape: torch.Size) -> torch.Tensor:
        loads[name] += 1
        return shaped(self, name, shape)

    monkeypatch.setattr(StoredWeights, "shaped", counted)
    compress(CompressOptions(str(model), tmp_path / "out", ratio=0.2, dataset=(pairs,)))
    outer = {name: count for name, count in loads.items() if "layers." not in name and "projector" not in name}
    # The LM head is loaded by the stage that needs it.
    outer.pop("lm_head.weight", None)
    assert len(outer) > 3
    assert set(outer.values()) == {1}
