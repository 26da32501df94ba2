"""Perplexity after round-to-nearest quantization, as a baseline for low-rank checkpoints.

    python benchmarks/quantization_baseline.py [FOLDER ...] [--wikitext DIR] [--quick] [--json FILE]

Quantizes the decoder's projections of SmolLM2-135M-Instruct, the same weights that `--ratio` counts, without
calibration: INT8 with one scale per output channel, INT4 with one scale per group of 32 or 128 inputs. Scales are
symmetric and stored in 16 bits. Activations stay in the model's dtype. Embeddings and norms stay as they are.
Compressed FOLDERs are evaluated on the same windows.

The text is WikiText-2's test set with the windows of quality.py (DIR holds wiki.test.raw), or without `--wikitext` the
docstrings of Python's standard library. No case has a bar except INT8, which must stay within 1 % of dense.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgsvd_vllm.hf  # noqa: F401  (registers the format)
from benchmarks.perplexity import held_out_prose, perplexity
from benchmarks.quality import paper_form, spread_windows
from pgsvd_vllm.errors import InputError
from tests.support import reference_model

SCALE_BITS = 16
# Case -> bits of a weight, and inputs that share a scale (None: all inputs of an output channel).
SCHEMES: dict[str, tuple[int, int | None]] = {
    "INT8 per channel": (8, None),
    "INT4 group 32": (4, 32),
    "INT4 group 128": (4, 128),
}
BARS = {"INT8 per channel": 1.01}
WINDOWS, QUICK_WINDOWS = 15, 4


def round_to_nearest(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """A weight [out, in] after symmetric rounding, dequantized to its dtype.

    Args:
        weight: floating point, [out, in].
        bits: of a stored integer.
        group: inputs that share a scale; the last group may be smaller. None: one scale for an output channel.
    """
    most = 2 ** (bits - 1) - 1
    pieces = []
    for piece in weight.float().split(group or weight.shape[1], dim=1):
        scale = (piece.abs().amax(1, keepdim=True) / most).clamp_min(torch.finfo(torch.float16).tiny)
        pieces.append((piece / scale).round().clamp(-most - 1, most) * scale)
    return torch.cat(pieces, 1).to(weight.dtype)


def bits_per_weight(bits: int, group: int | None, columns: int) -> float:
    """Stored bits of a weight of `columns` inputs, with its share of the scales."""
    return bits + SCALE_BITS * -(-columns // (group or columns)) / columns


def projections(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """The linear layers of the decoder."""
    return (module for module in model.model.layers.modules() if isinstance(module, nn.Linear))


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int, group: int | None) -> float:
    """Round the decoder's projections in place; returns the mean stored bits of a weight."""
    stored, weights = 0.0, 0
    for module in projections(model):
        module.weight.copy_(round_to_nearest(module.weight, bits, group))
        stored += bits_per_weight(bits, group, module.in_features) * module.weight.numel()
        weights += module.weight.numel()
    return stored / weights


def main() -> int:
    """Evaluate every case, print a table, write JSON; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a checkpoint to evaluate as well")
    parser.add_argument("--wikitext", type=Path, metavar="DIR", help="has wiki.test.raw (default: Python's docstrings)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_WINDOWS} windows instead of {WINDOWS}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    dense = reference_model.smollm2()
    text = held_out_prose()
    if arguments.wikitext:
        text = paper_form((arguments.wikitext / "wiki.test.raw").read_text(encoding="utf-8"))
    windows = spread_windows(dense, [text], QUICK_WINDOWS if arguments.quick else WINDOWS)

    def evaluate(folder: Path, case: str) -> tuple[str, float, float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        bits = quantize(model, *SCHEMES[case]) if case in SCHEMES else float("nan")
        return case, bits, perplexity(model, windows, desc=case)

    found = [evaluate(dense, case) for case in ("dense", *SCHEMES)]
    found += [evaluate(folder, folder.name) for folder in arguments.folders]
    base = found[0][2]
    rows: list[dict[str, object]] = []
    print(f"{'':24}{'bits per weight':>16}{'perplexity':>12}{'over dense':>12}")
    for case, bits, value in found:
        bar = BARS.get(case)
        print(f"{case:24}{bits:16.2f}{value:12.2f}{value / base:12.3f}")
        rows.append({"case": case, "value": value / base, "bar": bar, "ok": bar is None or value / base <= bar})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as problem:
        sys.exit(f"quantization_baseline.py: error: {problem}")
