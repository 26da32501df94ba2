"""Triton kernels without a GPU: interpreted against float64, with planted bugs, and compiled for GPUs."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgsvd_vllm.errors import InputError
from tests.conftest import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed")

from pgsvd_vllm.kernels.cublas import run_library  # noqa: E402
from pgsvd_vllm.kernels.launch import SplitKScratch, aligned, room, run  # noqa: E402
from pgsvd_vllm.kernels.layer_shape import LayerShape  # noqa: E402
from pgsvd_vllm.kernels.packed_weights import PackedLayer  # noqa: E402
from pgsvd_vllm.kernels.quantized_matrix import QuantizedMatrix  # noqa: E402
from pgsvd_vllm.kernels.shard_weights import Shard  # noqa: E402
from pgsvd_vllm.kernels.tile_heuristics import FEW_TOKENS_OF_MANY, default_steps, down_tile  # noqa: E402
from pgsvd_vllm.serving.gemm import gpu  # noqa: E402
from pgsvd_vllm.serving.gemm.gpu import ScratchPool, TritonGemms, can_take  # noqa: E402
from tests.kernels.interpreted import Layer  # noqa: E402
from tests.kernels.mutants import MUTANTS, planted  # noqa: E402

Run = subprocess.CompletedProcess[str]
INTERPRETER = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
KERNELS = ("down", "up", "gated", "permute")


def kernel_source(kernel: str) -> str:
    return (ROOT / "kernels" / f"{kernel}.py").read_text(encoding="utf-8")


def script(path: str, *arguments: object, **environment: str) -> Run:
    return subprocess.run(
        [sys.executable, ROOT / path, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def interpreted(seed: int, cases: int, *folder: Path, **environment: str) -> Run:
    """The interpreter is chosen when a kernel is defined: a process of its own."""
    return script("tests/kernels/interpreted.py", seed, cases, *folder, **INTERPRETER, **environment)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_layers_match_float64(seed: int) -> None:
    done = interpreted(seed, 100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "100 layers\n"


def test_tuned_tiles_are_the_fastest_and_used(tmp_path: Path) -> None:
    done = script("tests/kernels/interpreted_tune.py", tmp_path, **INTERPRETER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "tuned\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cublas_path_matches_float64(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    for tokens in (1, 2, 17, 300):
        for _ in range(10):
            one = Layer(rng, dtype, rng.choice([16, 100, 129]))
            packed = PackedLayer(one.shards)
            x, bias = torch.randn(tokens, packed.columns).to(dtype), torch.randn(packed.out).to(dtype)
            for added in (None, bias):
                assert one.difference(x, added, run_library(x, packed, added)) == ""


@pytest.mark.parametrize(
    "part", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "reload", "cuts", "activation", "bits"]
)
def test_vllm_layers_run_the_kernels(part: str) -> None:
    """All mixes of tests/serving/layers/test_linear.py, loaded and called as on a GPU, interpreted."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    done = script("tests/kernels/interpreted_layers.py", part, **INTERPRETER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"[1-9]\d* layers, [1-9]\d* launches\n", done.stdout[done.stdout.rfind("\n", 0, -1) + 1 :])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if bug.core else pytest.mark.slow) for name, bug in MUTANTS.items()]
)
def test_a_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    for kernel in KERNELS:
        source = kernel_source(kernel)
        bug = MUTANTS[name]
        (tmp_path / f"{kernel}.py").write_text(
            planted(bug, source) if kernel == bug.kernel else source, encoding="utf-8"
        )
    done = interpreted(3, 100, tmp_path)
    assert done.returncode == 1
    # The comparison finds it; Python does not refuse the source.
    found = "off by|stored twice|in no tensor of the launch|the second run differs|launches|before it has ended"
    assert re.search(found, done.stderr), done.stderr[-2000:]


def test_every_bug_can_be_planted() -> None:
    """The slow ones too, whose source may change while only the core is run."""
    for bug in MUTANTS.values():
        compile(planted(bug, kernel_source(bug.kernel)), bug.kernel, "exec")


def test_core_bugs_have_every_kind_in_every_kernel() -> None:
    core = {(bug.kernel, bug.kind) for bug in MUTANTS.values() if bug.core}
    assert core == {(bug.kernel, bug.kind) for bug in MUTANTS.values()}
    assert {kernel for kernel, _ in core} == set(KERNELS)


def test_compiled_kernels_keep_their_limits(tmp_path: Path) -> None:
    targets = ("sm_80", "sm_90", "gfx942")  # the slow test has all
    done = script("benchmarks/kernel_resources.py", "--quick", "--targets", *targets, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    # On one target with and without overlap; three tiles, each of a down, three up and a gated kernel, and two up.
    # With weights of 8 bits on two targets, once.
    assert len(rows) == (3 + 1) * (3 * 5 + 2) + 2 * (3 * 5)
    assert all(row["registers"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (["--quick"], (5 + 2) * (3 * 5 + 2) + 2 * (3 * 5)),
        # All but the down kernels with and without places and bias, two dtypes; INT8 on all targets, FP8 on three.
        ([], (5 + 2) * (3 * (1 + 2 * 4) + 2 * 2) * 2 + (5 + 3) * (3 * 5)),
        (["--candidates"], None),
    ],
)
def test_all_compiled_kernels_keep_their_limits(options: list[str], kernels: int | None, tmp_path: Path) -> None:
    done = script("benchmarks/kernel_resources.py", *options, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == kernels if kernels else len(rows) > 100


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_other_supported_triton_versions(version: str, tmp_path: Path) -> None:
    """GPU builds of torch 2.11 and of vLLM 0.33 bring these."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, f"triton=={version}"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        pytest.skip(f"triton {version} cannot be downloaded: {done.stderr[-300:]}")
    done = interpreted(1, 40, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    done = script("benchmarks/kernel_resources.py", "--quick", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"triton {version}\n" in done.stdout


def test_gpu_check_dry_run_lists_its_cases() -> None:
    done = subprocess.run(
        ["make", "gpu-check", "ARGS=--dry-run"], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "900 random layers, and with weights of 8 bits; 4 layers of Llama-2-7B, 200 repeats" in done.stdout


def layer(*shards: tuple[int, int, int | None]) -> PackedLayer:
    """Shards of (outputs, inputs, rank)."""
    weights = []
    for out, columns, rank in shards:
        up = None if rank is None else torch.randn(out, rank)
        weights.append(Shard(torch.randn(out if rank is None else rank, columns), up))
    return PackedLayer(weights)


def test_inputs_for_which_triton_would_compile_anew_are_copied() -> None:
    packed, memory = layer((32, 64, 8)), torch.randn(1024)
    for usual in (memory[:256].view(4, 64), memory[:320].view(4, 80)[:, :64]):
        assert aligned(usual, packed, None) is usual
    shifted, odd, turned = memory[3:259].view(4, 64), memory[:280].view(4, 70)[:, :64], memory[:256].view(64, 4).T
    for x in (shifted, odd, turned):
        copy = aligned(x, packed, None)
        assert copy.equal(x)
        assert copy.stride() == (64, 1)
        assert copy.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([(8, 16, 4)] * 4, "4 low-rank shards; the kernels take up to 3"),
        ([(8, 16, 4), (8, 24, 4)], "shards of different inputs: [16, 24]"),
    ],
)
def test_unsupported_layers_are_refused(shards: list[tuple[int, int, int | None]], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        layer(*shards)


def test_mismatched_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="the kernels take float16, bfloat16 and float32"):
        PackedLayer([Shard(torch.zeros(4, 16).double(), torch.zeros(8, 4).double())])
    with pytest.raises(ValueError, match="^an up factor of another rank than its down factor"):
        PackedLayer([Shard(torch.zeros(4, 16), torch.zeros(8, 5))])
    with pytest.raises(ValueError, match=r"weights of torch\.float16 \(8, 4\) beside torch\.float32"):
        PackedLayer([Shard(torch.zeros(4, 16), torch.zeros(8, 4).half())])


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 17), None, "inputs of torch.float32"),
        (torch.zeros(3, 16).half(), None, "inputs of torch.float16"),
        (torch.zeros(2, 3, 16), None, "inputs of torch.float32"),
        (torch.zeros(3, 16), torch.zeros(9), r"a bias of \(9,\) for 8 outputs"),
    ],
)
def test_mismatched_inputs_are_refused(x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    one = layer((8, 16, 4))
    with pytest.raises(ValueError, match=message):
        run(x, one, SplitKScratch(x.device), bias)


def test_too_small_scratch_is_refused() -> None:
    wide = layer((8, 4096, 4))
    assert down_tile(2, wide.sizes).split_k > 1
    with pytest.raises(ValueError, match=r"the scratch is too small for 2 tokens in 8 parts"):
        run(torch.zeros(2, 4096), wide, SplitKScratch(torch.device("cpu")))


def test_environment_chooses_the_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    down, up = torch.randn(4, 16), torch.randn(8, 4)
    monkeypatch.setenv("PGSVD_KERNELS", "torch")
    gemms = TritonGemms([Shard(down, up)], False)
    x = torch.randn(3, 16)
    torch.testing.assert_close(gemms(x), x @ down.T @ up.T)
    monkeypatch.setenv("PGSVD_KERNELS", "cuda")
    with pytest.raises(InputError, match="PGSVD_KERNELS=cuda: must be triton or torch"):
        TritonGemms([Shard(down, up)], False)


def eight_bits(rows: int, columns: int, dtype: torch.dtype = torch.int8, groups: int = 1) -> QuantizedMatrix:
    return QuantizedMatrix(torch.zeros(rows, columns).to(dtype), torch.ones(rows, groups), 8)


def test_layers_of_8_bits_are_taken_where_all_of_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    down, up, bf16 = eight_bits(4, 16), eight_bits(8, 4), torch.bfloat16
    assert can_take([Shard(down, up), Shard(eight_bits(6, 16))], bf16)
    # vLLM's own GEMMs compute these: float32 inputs, dense shards alone, kinds side by side, and groups.
    assert not can_take([Shard(down, up)], torch.float32)
    assert not can_take([Shard(down)], bf16)
    assert not can_take([Shard(down, up), Shard(torch.zeros(6, 16, dtype=bf16))], bf16)
    assert not can_take([Shard(down, eight_bits(8, 4, torch.float8_e4m3fn))], bf16)
    assert not can_take([Shard(eight_bits(4, 16, groups=2), up)], bf16)
    assert not can_take([Shard(QuantizedMatrix(down.values, down.scale, 4), up)], bf16)
    assert not can_take([Shard(down, up)] * 4, bf16)
    monkeypatch.setenv("PGSVD_KERNELS", "torch")
    assert not can_take([Shard(down, up)], bf16)


@pytest.mark.parametrize(
    ("capability", "suits"),
    # Weights of bf16, INT8 and FP8.
    [
        ((7, 5), (False, False, False)),
        ((8, 0), (True, True, False)),
        ((8, 9), (True, True, True)),
        ((9, 0), (True, True, True)),
        ((10, 0), (True, False, True)),
    ],
)
def test_gpus_that_the_kernels_suit(
    capability: tuple[int, int], suits: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    device, weights = torch.device("cuda"), (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
    assert tuple(gpu._suits(torch.bfloat16, one, device) for one in weights) == suits
    assert not gpu._suits(torch.float32, torch.float32, device)


def test_unreadable_tile_table_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGSVD_KERNEL_TABLE", str(tmp_path / "none.json"))
    shard = Shard(torch.randn(4, 16).half(), torch.randn(8, 4).half())
    with pytest.raises(InputError, match=r"^PGSVD_KERNEL_TABLE: .*none\.json: cannot be read"):
        TritonGemms([shard], False)


def test_every_stream_has_its_own_scratch() -> None:
    spaces = ScratchPool(torch.device("cpu"))
    small, large = (default_steps(LayerShape(2048, rows, 4096, rows, 1, False)) for rows in (160, 3200))
    spaces.reserve(160, small)
    first = spaces.of_stream(1, capturing=False)
    assert first is not None
    assert (len(first.partials), len(first.counters)) >= room(160, small)
    # Graph capture allocates nothing: it takes scratch that exists already.
    assert spaces.of_stream(2, capturing=True) is None
    second = spaces.of_stream(2, capturing=False)
    assert second is not None
    assert second is not first
    assert spaces.of_stream(2, capturing=True) is second
    # Larger layers grow the scratch of every stream; buffers that a captured graph may write stay alive.
    before = first.partials
    spaces.reserve(3200, large)
    numbers, tiles = room(3200, large)
    for space in (first, second):
        assert len(space.partials) >= numbers
        assert len(space.counters) >= tiles
        assert not space.counters.any()
    assert any(kept is before for kept in first._outgrown)


@pytest.mark.parametrize(("rows", "columns"), [(16, 576), (640, 2048), (3696, 4096), (11008, 4096), (2816, 11008)])
def test_scratch_fits_every_token_count(rows: int, columns: int) -> None:
    space = SplitKScratch(torch.device("cpu"))
    sizes = LayerShape(columns, rows, 3 * columns, rows // 3, 3, False)
    space.grow(*room(16, default_steps(LayerShape(16, 16, 16, 16, 3, False))))
    space.grow(*room(rows, default_steps(sizes)))
    for tokens in range(1, FEW_TOKENS_OF_MANY + 1):
        tile = down_tile(tokens, sizes)
        # No part is without columns.
        steps = -(-columns // tile.block_k)
        assert -(-steps // tile.split_k) * (tile.split_k - 1) < steps
        if tile.split_k > 1:
            assert space.partials.numel() >= tile.split_k * tokens * rows
            tiles = -(-tokens // tile.block_m) * -(-rows // tile.block_out)
            assert space.counters.numel() >= tiles
