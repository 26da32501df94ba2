"""Gram matrices are exactly symmetric, whatever instructions the processor has."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from pgsvd_vllm.offline.linalg import gram_of
generator = torch.Generator().manual_seed(0)
for tokens, width in ((97, 131), (4096, 128), (600, 1023)):
    rows = torch.randn(tokens, width, generator=generator)
    gram = gram_of(rows)
    assert torch.equal(gram, gram.T), (tokens, width)
    torch.testing.assert_close(gram, rows.double().T @ rows.double(), rtol=1e-4, atol=1e-2)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_gram_matrices_are_exactly_symmetric(instructions: str) -> None:
    """With AVX2, MKL's float32 GEMM rounds the two triangles of x^T x differently."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
