"""Writes docs/models.md from the tables of tests/e2e/architectures.py and vision_models.py, after a run of all tests.

python tests/models.py        # runs the tests, some minutes
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.e2e.architectures import ARCHITECTURES, BF16  # noqa: E402
from tests.e2e.vision_models import VISION_MODELS, VisionModel  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
HEAD = """# Models

Written by `python tests/models.py` after a run of `tests/e2e/test_architectures.py` and `test_vision.py`, on vLLM
{vllm} (CPU) and transformers {transformers}. A tiny random model of every architecture is compressed by 25 %,
verified, and served by vLLM with every projection factored. In float32 it matches transformers' greedy tokens for the
same checkpoint, or, where noted, the tokens of the reconstructed dense model in vLLM. Where vLLM's CPU kernels take
bf16 alone, its greedy tokens are at most 0.03 nats less likely on average than transformers' in float32 (answers about
images: 0.3 nats at most).
Vision-language models have both towers compressed, and the projector where noted, with calibration on image-text pairs;
vLLM's log-probabilities of their answers, or their embeddings, match those of transformers.

| models | configuration class | notes | test |
|---|---|---|---|
"""
TAIL = """
Other architectures: `compress` finds the module list that holds most linear weights of a causal language model and
compresses the `nn.Linear` (or transposed `Conv1D`) modules in it, whatever their names. One layer of each kind runs on
a short text first. A module is a projection if its layer calls it once with one tensor, it returns that tensor times
its whole weight, nothing else reads the weight, and its output is more than a choice between experts or tokens.
Routers, indexers and parts of state-space layers thus stay dense, and `--dry-run` lists them. In vision-language models
this happens for each part of the configuration, and for the projector between the two towers (0.3 % of LLaVA 1.5 7B's
parameters), which is a tower of its own. A projector stays dense where vLLM does not build it from its own linear
layers (PaliGemma, Gemma 3) or where no test covers it (`SERVED_PROJECTORS` in `pgsvd_vllm/families.py`). Linear layers
outside of these lists stay dense, such as CLIP's two projections, and so do stacked MoE experts. `--include experts`
compresses the experts of checkpoints that store one tensor per expert, each on the tokens that reach it. Experts and
projectors that fewer tokens reach than they have inputs stay dense, with a warning. `--include lm_head` compresses the
LM head, unless it is tied to the input embeddings. Layers whose output the model ignores stay dense: the last layer of
LLaVA's vision tower. What a model adds to the hidden states between two layers of the list is kept. `compress` refuses
models that change them there in another way, whose layers depend on more than the hidden states of the layer before
(such as keys and values shared between layers), or that change their weights while they run. It warns of an
architecture that has no row above and, where vLLM is installed, says whether vLLM's model has a layer for every
projection. [reliability.md](reliability.md) has the outcomes for other language models of transformers. With `--load-
format pgsvd`, a factored module that is a plain matrix in vLLM's model gets dense weights, reconstructed at load, with
a warning that names it; if vLLM's model has no module of that name, loading stops with an error that names the
`--ignore` pattern.

vLLM excludes SigLIP's MLPs from every quantization when 64 does not divide their sizes. `--load-format pgsvd` serves
their factors nevertheless; without it such a checkpoint does not load.

To add an architecture, add a row to `ARCHITECTURES` or `VISION_MODELS` and run `python tests/models.py`.

Real weights: [quality.md](quality.md) has SmolLM2-135M (Llama), Gemma 3 270M, and a small CLIP trained for it.
"""


def rows() -> list[str]:
    """The document's table, as it is when all tests pass."""
    found = []
    for row in (*ARCHITECTURES, *VISION_MODELS):
        compared = "" if row.like_transformers else "; compared with the reconstructed dense model"
        compared += "; in bf16" if getattr(row, "engine", {}) == BF16 else ""
        projector = "; with its projector" if isinstance(row, VisionModel) and row.projector else ""
        note = f"{row.note}{projector}{compared}".removeprefix("; ")
        found.append(f"| {row.name} | `{row.config}` | {note} | passed |")
    return found


def main() -> int:
    """Run the tests, and write the document if they pass."""
    import transformers
    import vllm

    files = [str(ROOT / "tests" / "e2e" / name) for name in ("test_architectures.py", "test_vision.py")]
    status = pytest.main(["-q", *files, "-k", "matches_transformers", "-m", "slow or not slow"])
    if status == 0:
        head = HEAD.format(vllm=vllm.__version__, transformers=transformers.__version__)
        DOCUMENT.write_text(head + "\n".join(rows()) + "\n" + TAIL, encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
