"""vLLM's layers with factored shards as they are on a GPU, their kernels in Triton's interpreter, against float64.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_layers.py

Only the question whether there is a GPU is answered otherwise than the truth.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from vllm.platforms import current_platform

from benchmarks.linear_cpu import one_rank
from pgsvd_vllm.triton_products import TritonProducts
from tests.kernels.interpreter import prepare, watch
from tests.serving.test_linear import MIXES, Case, check


def main() -> None:
    prepare(0)
    current_platform.is_cuda_alike = lambda: True
    layers = 0
    with one_rank():
        before = watch.launches
        for dtype in (torch.bfloat16, torch.float16):
            for bias in (False, True):
                for leaf, ranks in MIXES:
                    case = Case(leaf, ranks, bias, dtype).load().finish()
                    if not isinstance(case.layer.pgsvd_gemms, TritonProducts):
                        raise SystemExit(f"{leaf} {ranks}: {type(case.layer.pgsvd_gemms).__name__}")
                    for tokens in (0, 1, 17, 300):
                        check(case, torch.randn(tokens, case.columns).to(dtype))
                    layers += 1
        print(f"{layers} layers, {watch.launches - before} launches")


if __name__ == "__main__":
    main()
