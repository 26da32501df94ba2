"""Writes docs/models.md from the tables of tests/e2e/architectures.py and vision_models.py, after a run of all tests.

python tests/models.py        # runs them, some minutes
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.e2e.architectures import ARCHITECTURES  # noqa: E402
from tests.e2e.vision_models import VISION_MODELS, VisionModel  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
HEAD = """# Models

Written by `python tests/models.py` after a run of `tests/e2e/test_architectures.py` and `test_vision.py`, on vLLM
{vllm} (CPU) and transformers {transformers}: a tiny random model of every architecture is compressed by 25 %,
verified, served by vLLM with every projection factored, and says in float32, token by token, what transformers makes
of the same folder (where noted, what the multiplied-back dense model says in vLLM). Of those that read images both
towers are compressed, and the projector where noted, calibrated on images with texts; vLLM's log-probabilities of what
they say of an image, or embeddings, are those of transformers.

| models | class of the configuration | | |
|---|---|---|---|
"""
TAIL = """
Anything else: every `nn.Linear` (or transposed `Conv1D`) in the list of layers that holds most of a causal language
model's linear weights is compressed, whatever it is called; of models that read images, in one such list for each
part of the configuration, and in the projector between the two towers (0.3 % of LLaVA 1.5 7B's parameters), which is a
tower of its own. Where vLLM does not make that of its own linear layers (PaliGemma, Gemma 3), or no test shows it, it
stays dense (`SERVED_PROJECTORS` in `offline/towers.py`), as does what lies outside of all these, such as CLIP's two
projections, and what a checkpoint stores in another form (experts that it has stacked). Experts that it stores one by
one are compressed with `--include experts`, on the tokens that reach each. Experts and projectors with more inputs than
tokens reach them stay dense, and a warning says so. The output head is compressed with `--include lm_head`, unless it
is the input embeddings. What nothing is computed from stays dense: the last layer of LLaVA's vision model.
Layers between which a model changes what they hand on are refused. What is factored and is a plain matrix in vLLM's
model is multiplied back while it loads with `--load-format pgsvd`, and a warning names it; if vLLM's model has nothing
of that name, loading stops with an error that says what to `--ignore`.

vLLM leaves the MLPs of SigLIP out of every quantization where 64 does not divide their sizes; with `--load-format
pgsvd` they are factored all the same, without it such a checkpoint does not load.

To add an architecture: add a row to `ARCHITECTURES`, or to `VISION_MODELS`, and run `python tests/models.py`.

Real weights: SmolLM2-135M (Llama), Gemma 3 270M, and a small CLIP that is trained for it, see `quality.md`.
"""


def rows() -> list[str]:
    """The document's table, as it is when all tests pass."""
    found = []
    for row in (*ARCHITECTURES, *VISION_MODELS):
        compared = "" if row.like_transformers else "; compared with the multiplied-back dense model"
        projector = "; with its projector" if isinstance(row, VisionModel) and row.projector else ""
        note = f"{row.note}{projector}{compared}".removeprefix("; ")
        found.append(f"| {row.name} | `{row.config}` | {note} | passed |")
    return found


def main() -> int:
    """Run the tests, and write the document if they pass."""
    import transformers
    import vllm

    files = [str(ROOT / "tests" / "e2e" / name) for name in ("test_architectures.py", "test_vision.py")]
    status = pytest.main(["-q", *files, "-k", "served", "-m", "slow or not slow"])
    if status == 0:
        head = HEAD.format(vllm=vllm.__version__, transformers=transformers.__version__)
        DOCUMENT.write_text(head + "\n".join(rows()) + "\n" + TAIL, encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
