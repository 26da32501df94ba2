"""Writes docs/models.md from the table of tests/e2e/architectures.py, after a run of all its tests.

python tests/models.py        # runs them, some minutes
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.e2e.architectures import ARCHITECTURES  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
HEAD = """# Models

Written by `python tests/models.py` after a run of `tests/e2e/test_architectures.py`, on vLLM {vllm} (CPU) and
transformers {transformers}: a tiny random model of every architecture is compressed by 25 %, verified, served by vLLM
with every projection factored, and says in float32, token by token, what transformers makes of the same folder (where
noted, what the multiplied-back dense model says in vLLM).

| models | class of the configuration | | |
|---|---|---|---|
"""
TAIL = """
Anything else: every `nn.Linear` (or transposed `Conv1D`) in the list of layers that holds most of a causal language
model's linear weights is compressed, whatever it is called; what lies outside of it, and what a checkpoint stores in
another form or under another name (stacked experts), stays dense. If vLLM's model has no linear layer of a projection's
name, loading with `--load-format pgsvd` stops with an error that says which to `--ignore`.

To add an architecture: add a row to `ARCHITECTURES` and run `python tests/models.py`.

Real weights: SmolLM2-135M (Llama) and Gemma 3 270M, see `quality.md`.
"""


def rows() -> list[str]:
    """The document's table, as it is when all tests pass."""
    found = []
    for row in ARCHITECTURES:
        compared = "" if row.like_transformers else "; compared with the multiplied-back dense model"
        found.append(f"| {row.name} | `{row.config}` | {row.note}{compared} | passed |")
    return found


def main() -> int:
    """Run the tests, and write the document if they pass."""
    import transformers
    import vllm

    tests = [str(ROOT / "tests" / "e2e" / "test_architectures.py"), "-k", "served", "-m", "slow or not slow"]
    status = pytest.main(["-q", *tests])
    if status == 0:
        head = HEAD.format(vllm=vllm.__version__, transformers=transformers.__version__)
        DOCUMENT.write_text(head + "\n".join(rows()) + "\n" + TAIL, encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
