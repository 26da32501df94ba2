"""The predicted times of GPU layers against those measured on an H100 and an H200 (docs/kernels.md)."""

import math

import pytest

from benchmarks.gpu_check import LAYERS, shards_of
from pgsvd_vllm.kernels.gpu_cost import GPUS, dense, factored

# Dense over factored time of Llama-2-7B's four layers: (form, removed) -> speed-ups at each number of tokens.
MEASURED = {
    "H100": (
        (1, 8, 32, 64, 128, 256, 512, 2048),
        {
            ("factors", 0.2): (1.17, 1.16, 1.06, 1.09, 1.08, 0.98, 1.04, 1.18),
            ("factors", 0.4): (1.50, 1.47, 1.35, 1.35, 1.31, 1.18, 1.20, 1.54),
            ("factors", 0.6): (2.04, 1.93, 1.70, 1.68, 1.64, 1.46, 1.60, 2.12),
            ("pivot", 0.2): (1.07, 1.04, 0.93, 0.96, 0.93, 0.85, 0.84, 1.03),
            ("pivot", 0.4): (1.39, 1.34, 1.20, 1.15, 1.13, 0.98, 1.02, 1.31),
            ("pivot", 0.6): (1.85, 1.77, 1.43, 1.46, 1.38, 1.27, 1.33, 1.68),
        },
    ),
    # At 32 tokens the H200 ran other kernels.
    "H200": (
        (1, 16, 64, 512, 2048),
        {
            ("factors", 0.2): (1.08, 1.08, 0.99, 1.08, 1.18),
            ("factors", 0.4): (1.35, 1.32, 1.21, 1.35, 1.55),
            ("pivot", 0.2): (0.97, 0.91, 0.84, 0.94, 1.05),
            ("pivot", 0.4): (1.25, 1.17, 1.00, 1.16, 1.35),
        },
    ),
}


@pytest.mark.parametrize(("name", "most"), [("H100", 0.11), ("H200", 0.15)])
def test_the_predictions_reproduce_the_measured_speed_ups(name: str, most: float) -> None:
    gpu, (counts, rows) = GPUS[name], MEASURED[name]
    errors = []
    for (form, removed), speed_ups in rows.items():
        for tokens, speed_up in zip(counts, speed_ups, strict=True):
            before = sum(dense(gpu, tokens, outs, columns) for outs, columns in LAYERS.values())
            layers = ((shards_of(layer, removed, form == "pivot"), LAYERS[layer][1]) for layer in LAYERS)
            after = sum(factored(gpu, tokens, shards, columns) for shards, columns in layers)
            errors.append(math.log(before / after / speed_up))
    assert max(map(abs, errors)) < most
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.055


@pytest.mark.parametrize("name", GPUS)
def test_more_tokens_and_higher_ranks_take_no_less_time(name: str) -> None:
    for layer, (outs, columns) in LAYERS.items():
        few, many = (dense(GPUS[name], tokens, outs, columns) for tokens in (1, 4096))
        assert 5 * few < many
        small, large = (factored(GPUS[name], 1, shards_of(layer, removed), columns) for removed in (0.6, 0.2))
        assert small < large
