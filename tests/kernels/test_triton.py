"""The Triton kernels without a GPU: in the interpreter against float64, with bugs planted, and compiled for GPUs."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pgsvd_vllm.errors import InputError
from tests.conftest import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed")

from pgsvd_vllm.kernels.cublas import run_library  # noqa: E402
from pgsvd_vllm.kernels.launch import SplitKScratch, room, run  # noqa: E402
from pgsvd_vllm.kernels.layer_shape import LayerShape  # noqa: E402
from pgsvd_vllm.kernels.packed_weights import PackedLayer  # noqa: E402
from pgsvd_vllm.kernels.tile_heuristics import FEW_TOKENS_OF_MANY, down_tile, usual_steps  # noqa: E402
from pgsvd_vllm.serving.gemm.gpu import ScratchPool, TritonGemms  # noqa: E402
from tests.kernels.interpreted import Layer  # noqa: E402

# (file, what it says, what a bug would say)
MUTANTS = {
    "stores rows past the last": ("up", "inside = (m2 < tokens) & (o2 < n)", "inside = m2 < tokens"),
    "stores tokens past the last": ("up", "inside = (m2 < tokens) & (o2 < n)", "inside = o2 < n"),
    "reads z past the rank": ("up", "mask=in_tokens & (c[None, :] < r)", "mask=in_tokens"),
    "third shard's z": ("up", "z_at, u_at = tl.where(third, r0 + r1, z_at)", "z_at, u_at = tl.where(third, r1, z_at)"),
    "second shard's places": ("up", "tl.where(second, n0, 0)", "tl.where(second, 0, 0)"),
    "bias of the row, not of its place": ("up", "acc += tl.load(bias + place", "acc += tl.load(bias + o2"),
    "a step left out": ("up", "range(0, r, BLOCK_K)", "range(BLOCK_K, r, BLOCK_K)"),
    "rows moved that are no outputs": (
        "up",
        "known = (m < tokens) & (place >= 0)",
        "known = (m < tokens) & (place >= -1)",
    ),
    "rows moved from elsewhere": ("up", "pid_n - blocks, pid_m", "pid_n - blocks + 1, pid_m"),
    "the second shard's programs are not counted": ("up", "blocks += tl.cdiv(n1, BLOCK_N)", "blocks += 0"),
    "rows moved without their bias": ("up", "mask=place >= 0, other=0.0)", "mask=place < 0, other=0.0)"),
    "parts overlap": (
        "down",
        "end = tl.minimum(columns, begin + each)",
        "end = tl.minimum(columns, begin + each + BLOCK_K)",
    ),
    "the first to end adds the parts": ("down", "if ended < SPLIT_K - 1:", "if ended > 0:"),
    "all add the parts": ("down", "if ended < SPLIT_K - 1:", "if ended < 0:"),
    "counters are left": ("down", "tl.store(counters + tile, 0)", "tl.store(counters + tile, 1)"),
    "one counter for all tokens": ("down", "tile = pid_m * tl.num_programs(0) + pid_r", "tile = pid_r"),
    "x past the last token": ("down", "in_tokens = m[:, None] < tokens", "in_tokens = m[:, None] < tokens + 1"),
    "columns past the last": ("down", "mask=in_tokens & (c[None, :] < columns)", "mask=in_tokens"),
    "weights past the last row": ("down", "tl.minimum(r, rows - 1)", "r"),
    "rows past the last": ("down", "inside = (m2 < tokens) & (r2 < rows)", "inside = m2 < tokens"),
    "sums rounded at each step": (
        "down",
        "acc, input_precision",
        "acc.to(tl.bfloat16).to(tl.float32), input_precision",
    ),
    "the gate's components for both": ("gated", "z_row + z0, z_row + z1", "z_row + z0, z_row + z0"),
    "the second up factor begins elsewhere": ("gated", "u + n0.to(tl.int64) * r0", "u + n0.to(tl.int64) * r1"),
    "the gate's places for both": ("gated", "places + half", "places"),
    "pivots read as rows": ("gated", "known1 = known1 & (place1[:, None] >= 0)", "known1 = known1"),
    "the wrong component": ("gated", "z_stride - 1 - place", "z_stride - place"),
    "the gate's bias for both": ("gated", "bias + half", "bias"),
    "a gate without its slope": ("gated", "gate / (1.0 + tl.exp(-gate))", "gate / (1.0 + tl.exp(-other))"),
    "gated outputs past the last": ("gated", "inside = (m2 < tokens) & (o2 < half)", "inside = m2 < tokens"),
    "rows moved before they are made": (
        "up",
        "                tl.extra.cuda.gdc_wait()\n            _place",
        "            _place",
    ),
    "z read before it is made by the up product": ("up", "        tl.extra.cuda.gdc_wait()\n    acc", "    acc"),
    "x read before it is made": ("down", "        tl.extra.cuda.gdc_wait()\n", ""),
    "z read before it is made": ("gated", "        tl.extra.cuda.gdc_wait()\n", ""),
    "outputs past the last are ordered": ("permute", "(m < tokens) & there[None, :]", "m < tokens"),
    "the gate's sources for both": ("permute", "sources + half + o", "sources + o"),
    "the gate's bias for both outputs": ("permute", "bias + half + o", "bias + o"),
    "the sums end with the first one": ("gated", "tl.maximum(r0, r1)", "r0"),
    "the second sum runs past its end": (
        "gated",
        "known1 = c[None, :] < r1",
        "known1 = c[None, :] < tl.maximum(r0, r1)",
    ),
}


Run = subprocess.CompletedProcess[str]
INTERPRETER = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


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


def mutant(name: str, folder: Path) -> Run:
    """The same for kernels with a bug."""
    file, right, wrong = MUTANTS[name]
    for kernel in ("down", "up", "gated", "permute"):
        source = (ROOT / "kernels" / f"{kernel}.py").read_text(encoding="utf-8")
        if kernel == file:
            assert right in source
            source = source.replace(right, wrong)
        (folder / f"{kernel}.py").write_text(source, encoding="utf-8")
    return interpreted(3, 100, folder)


def started(case: int | str, folder: Path) -> Run:
    """A seed of random layers, a bug, or the name of another script for the interpreter."""
    if isinstance(case, int):
        return interpreted(case, 100)
    if case in MUTANTS:
        return mutant(case, folder)
    return script(f"tests/kernels/{case}.py", folder, **INTERPRETER)


@pytest.fixture(scope="module")
def interpreter_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int | str, Future[Run]]]:
    """What the chosen tests want interpreted: one thread each, as many at once as there are cores, eight at most."""
    items = [item for item in request.session.items if "interpreter_runs" in getattr(item, "fixturenames", ())]
    cases = [item.callspec.params["case"] for item in items]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        runs = {case: pool.submit(started, case, tmp_path_factory.mktemp("kernels")) for case in cases}
        yield runs
        for run in runs.values():
            run.cancel()


@pytest.mark.parametrize("case", range(2))
def test_random_layers_are_those_of_float64(case: int, interpreter_runs: dict[int | str, Future[Run]]) -> None:
    done = interpreter_runs[case].result()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "100 layers\n"


@pytest.mark.parametrize("case", ["interpreted_tune"])
def test_tuning_finds_the_fastest_tiles_and_layers_take_them(
    case: str, interpreter_runs: dict[int | str, Future[Run]]
) -> None:
    done = interpreter_runs[case].result()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "tuned\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_library_path_is_that_of_float64(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    for tokens in (1, 2, 17, 300):
        for _ in range(10):
            one = Layer(rng, dtype, rng.choice([16, 100, 129]))
            packed = PackedLayer(one.readers, one.ups, one.places)
            x, bias = torch.randn(tokens, packed.columns).to(dtype), torch.randn(packed.out).to(dtype)
            for added in (None, bias):
                assert one.difference(x, added, run_library(x, packed, added)) == ""


@pytest.mark.parametrize("case", ["interpreted_layers"])
def test_layers_of_vllm_use_the_kernels_where_there_is_a_gpu(
    case: str, interpreter_runs: dict[int | str, Future[Run]]
) -> None:
    """All mixes of tests/serving/test_linear.py, loaded and called as on a GPU, interpreted."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    done = interpreter_runs[case].result()
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"\d+ layers, \d+ launches\n", done.stdout[done.stdout.rfind("\n", 0, -1) + 1 :])


@pytest.mark.parametrize("case", MUTANTS)
def test_a_planted_bug_is_found(case: str, interpreter_runs: dict[int | str, Future[Run]]) -> None:
    done = interpreter_runs[case].result()
    assert done.returncode == 1
    # Found by what the test compares, not by Python refusing the source.
    found = "off by|stored twice|in no tensor of the launch|the second run differs|launches|before it has ended"
    assert re.search(found, done.stderr), done.stderr[-2000:]


def test_machine_code_keeps_within_the_bars(tmp_path: Path) -> None:
    done = script("benchmarks/kernel_resources.py", "--quick", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    # On two targets with and without overlap; three tiles, each of a down, three up and a gated kernel, and two up.
    assert len(rows) == (5 + 2) * (3 * 5 + 2)
    assert all(row["registers"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        # All but the down kernels with and without places and bias, two dtypes; else as above.
        ([], (5 + 2) * (3 * (1 + 2 * 4) + 2 * 2) * 2),
        (["--candidates"], None),
    ],
)
def test_all_machine_code_keeps_within_the_bars(options: list[str], kernels: int | None, tmp_path: Path) -> None:
    done = script("benchmarks/kernel_resources.py", *options, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == kernels if kernels else len(rows) > 100


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_other_tritons_of_the_range(version: str, tmp_path: Path) -> None:
    """What GPU builds of torch 2.11 and of vLLM 0.33 come with."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, f"triton=={version}"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        pytest.skip(f"triton {version} cannot be downloaded: {done.stderr[-300:]}")
    done = interpreted(1, 40, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    done = script("benchmarks/kernel_resources.py", "--quick", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"triton {version}\n" in done.stdout


def test_the_check_for_gpus_says_what_it_would_do() -> None:
    done = subprocess.run(
        ["make", "gpu-check", "ARGS=--dry-run"], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "900 random layers; 4 layers of Llama-2-7B, 200 repeats" in done.stdout


def layer(*shards: tuple[int, int, int | None]) -> PackedLayer:
    """Shards of (outputs, inputs, rank)."""
    readers = [torch.randn(out if rank is None else rank, columns) for out, columns, rank in shards]
    ups = [None if rank is None else torch.randn(out, rank) for out, _, rank in shards]
    return PackedLayer(readers, ups, [None] * len(shards))


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([(8, 16, 4)] * 4, "4 low-rank shards; the kernels take up to 3"),
        ([(8, 16, 4), (8, 24, 4)], "shards of different inputs: [16, 24]"),
    ],
)
def test_layers_that_the_kernels_cannot_serve_are_refused(
    shards: list[tuple[int, int, int | None]], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        layer(*shards)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="the kernels take float16, bfloat16 and float32"):
        PackedLayer([torch.zeros(4, 16).double()], [torch.zeros(8, 4).double()], [None])
    with pytest.raises(ValueError, match="^an up factor of another rank than its down factor"):
        PackedLayer([torch.zeros(4, 16)], [torch.zeros(8, 5)], [None])
    with pytest.raises(ValueError, match=r"weights of torch\.float16 \(8, 4\) beside torch\.float32"):
        PackedLayer([torch.zeros(4, 16)], [torch.zeros(8, 4).half()], [None])


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 17), None, "inputs of torch.float32"),
        (torch.zeros(3, 16).half(), None, "inputs of torch.float16"),
        (torch.zeros(2, 3, 16), None, "inputs of torch.float32"),
        (torch.zeros(3, 16), torch.zeros(9), r"a bias of \(9,\) for 8 outputs"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    one = layer((8, 16, 4))
    with pytest.raises(ValueError, match=message):
        run(x, one, SplitKScratch(x.device), bias)


def test_a_workspace_that_is_too_small_is_refused() -> None:
    wide = layer((8, 4096, 4))
    assert down_tile(2, wide.sizes).split_k > 1
    with pytest.raises(ValueError, match=r"the workspace is too small for 2 tokens in 8 parts"):
        run(torch.zeros(2, 4096), wide, SplitKScratch(torch.device("cpu")))


def test_the_environment_chooses_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(4, 16)], [torch.randn(8, 4)], [None], False
    monkeypatch.setenv("PGSVD_KERNELS", "torch")
    products = TritonGemms(*weights)
    x = torch.randn(3, 16)
    torch.testing.assert_close(products(x), x @ weights[0][0].T @ weights[1][0].T)
    monkeypatch.setenv("PGSVD_KERNELS", "cuda")
    with pytest.raises(InputError, match="PGSVD_KERNELS=cuda: must be triton or torch"):
        TritonGemms(*weights)


def test_a_chosen_table_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGSVD_KERNEL_TABLE", str(tmp_path / "none.json"))
    weights = [torch.randn(4, 16).half()], [torch.randn(8, 4).half()], [None], False
    with pytest.raises(InputError, match=r"^PGSVD_KERNEL_TABLE: .*none\.json: cannot be read"):
        TritonGemms(*weights)


def test_every_stream_has_its_own_workspace() -> None:
    spaces = ScratchPool(torch.device("cpu"))
    small, large = (usual_steps(LayerShape(2048, rows, 4096, rows, 1, False)) for rows in (160, 3200))
    spaces.reserve(160, small)
    first = spaces.of_stream(1, capturing=False)
    assert first is not None
    assert (len(first.partials), len(first.counters)) >= room(160, small)
    # Nothing is made while a graph is captured; what was made before is taken.
    assert spaces.of_stream(2, capturing=True) is None
    second = spaces.of_stream(2, capturing=False)
    assert second is not None
    assert second is not first
    assert spaces.of_stream(2, capturing=True) is second
    # Larger layers find room on all of them; what a captured graph may still write stays.
    before = first.partials
    spaces.reserve(3200, large)
    numbers, tiles = room(3200, large)
    for space in (first, second):
        assert len(space.partials) >= numbers
        assert len(space.counters) >= tiles
        assert not space.counters.any()
    assert any(kept is before for kept in first._outgrown)


@pytest.mark.parametrize(("rows", "columns"), [(16, 576), (640, 2048), (3696, 4096), (11008, 4096), (2816, 11008)])
def test_the_workspace_has_room_for_every_number_of_tokens(rows: int, columns: int) -> None:
    space = SplitKScratch(torch.device("cpu"))
    sizes = LayerShape(columns, rows, 3 * columns, rows // 3, 3, False)
    space.grow(*room(16, usual_steps(LayerShape(16, 16, 16, 16, 3, False))))
    space.grow(*room(rows, usual_steps(sizes)))
    for tokens in range(1, FEW_TOKENS_OF_MANY + 1):
        tile = down_tile(tokens, sizes)
        # A part without columns would be a program for nothing.
        steps = -(-columns // tile.block_k)
        assert -(-steps // tile.split_k) * (tile.split_k - 1) < steps
        if tile.split_k > 1:
            assert space.partials.numel() >= tile.split_k * tokens * rows
            tiles = -(-tokens // tile.block_m) * -(-rows // tile.block_out)
            assert space.counters.numel() >= tiles
