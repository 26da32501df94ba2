"""Tile tables: written, read back, searched, and refused when malformed."""

import json
from pathlib import Path
from typing import Any

import pytest

from pgsvd_vllm.kernels.layer_shape import LayerShape, ShardShape, layer_shape_of
from pgsvd_vllm.kernels.tile_heuristics import MOST_TOKENS, Step, Tile, default_steps, own_tiles, tiles_for
from pgsvd_vllm.kernels.tile_table import Table, default_path, read_table, write_table

FEW = (Tile(16, 64, 128, 4, 3, 8), Tile(16, 32, 256, 4, 2, swap=True))
MANY = (None, Tile(128, 64, 64, 8, 3))
STEPS = (Step(1, FEW), Step(16, None), Step(MOST_TOKENS, MANY))
SIZES = LayerShape(4096, 3696, 12288, 1232, 3, False)


def test_a_written_table_reads_back_equal(tmp_path: Path) -> None:
    table = Table("GPU of a test", {SIZES: STEPS, LayerShape(64, 32, 0, 0, 0, True): STEPS[:1]})
    write_table(table, tmp_path / "new" / "table.json")
    assert read_table(tmp_path / "new" / "table.json") == table
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("tokens", "tiles"), [(1, FEW), (2, None), (16, None), (17, MANY), (MOST_TOKENS, MANY), (MOST_TOKENS + 1, None)]
)
def test_token_counts_find_their_step(tokens: int, tiles: Any) -> None:
    assert tiles_for(STEPS, tokens) == tiles


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize(
    ("shards", "scattered", "gated", "most"),
    [(1, False, False, 16), (1, True, False, 16), (2, False, False, 32), (2, True, False, 16), (3, True, False, 32)]
    + [(3, False, False, 128), (2, True, True, 32), (1, True, True, 32)],
)
def test_usual_steps_use_the_kernels_up_to_their_limit(
    shards: int, scattered: bool, gated: bool, most: int, amd: bool
) -> None:
    sizes = LayerShape(4096, 3696, 12288, 1232, shards, scattered)
    steps = default_steps(sizes, gated, amd)
    for tokens in range(1, MOST_TOKENS + 1):
        assert tiles_for(steps, tokens) == (own_tiles(tokens, sizes, gated, amd) if tokens <= most else None)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (SIZES, 1),
        (LayerShape(4096, 3696, 12288, 1000, 3, False), 1),
        (LayerShape(4096, 3696, 12288, 800, 3, False), None),
        (LayerShape(4096, 4800, 12288, 1232, 3, False), None),
        (LayerShape(4096, 3400, 12288, 1200, 3, False), 1),
        (LayerShape(4096, 3100, 12288, 1130, 3, False), 2),
        (LayerShape(2048, 3696, 12288, 1232, 3, False), None),
        (LayerShape(4096, 3696, 12288, 1232, 2, False), None),
        (LayerShape(4096, 3696, 12288, 1232, 3, True), None),
    ],
)
def test_a_layer_takes_the_steps_of_a_similar_shape(sizes: LayerShape, found: int | None) -> None:
    table = Table("", {SIZES: (Step(1, FEW),), LayerShape(4096, 3000, 12288, 1100, 3, False): (Step(2, FEW),)})
    steps = table.steps(sizes)
    assert (steps[0].most_tokens if steps else None) == found
    assert Table("").steps(sizes) is None


def test_shapes_count_padded_ranks_and_up_rows() -> None:
    assert layer_shape_of([ShardShape(100, 17), ShardShape(60, 16, 16), ShardShape(20)], 64) == LayerShape(
        64, 32 + 16 + 20, 144, 4016 // 144, 2, True
    )
    # All outputs are pivots: the up GEMM has no rows, and nothing is padded.
    assert layer_shape_of([ShardShape(17, 17, 17)], 64) == LayerShape(64, 17, 0, 0, 0, True)


def test_the_default_file_is_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_path("NVIDIA H100 80GB HBM3/../x") == Path(
        "/somewhere/pgsvd-vllm/kernels/NVIDIA_H100_80GB_HBM3_.._x.json"
    )


def content() -> dict[str, Any]:
    tile = {"block_m": 16, "block_out": 32, "block_k": 64, "warps": 4, "stages": 3, "split_k": 2, "swap": False}
    steps = [{"most_tokens": 1, "tiles": {"down": dict(tile), "up": dict(tile)}}, {"most_tokens": 16, "tiles": None}]
    layer = {"columns": 64, "rows": 32, "heights": 100, "rank": 16, "shards": 2, "scattered": False, "steps": steps}
    return {"version": 2, "device": "a GPU", "layers": [layer]}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 1, "version 1, this program reads 2"),
        (("layers", 0, "scattered"), 0, "scattered is 0"),
        (("layers", 0, "shards"), -1, "-1 is no whole number from 0"),
        (("layers",), None, "not a table of tiles"),
        (("layers", 0), "x", "not a table of tiles"),
        (("layers", 0, "rows"), 0, "0 is no whole number from 1"),
        (("layers", 0, "rank"), True, "True is no whole number"),
        (("layers", 0, "steps"), [], "numbers of tokens must ascend"),
        (("layers", 0, "steps", 1, "most_tokens"), 1, "numbers of tokens must ascend"),
        (("layers", 0, "steps", 1, "most_tokens"), 10**9, "no whole number from 1 to 256"),
        (("layers", 0, "steps", 0, "tiles", "down", "block_m"), 48, "48 is no power of 2"),
        (("layers", 0, "steps", 0, "tiles", "down", "block_k"), 8, "8 is no whole number from 16"),
        (("layers", 0, "steps", 0, "tiles", "up", "warps"), 3, "3 is no power of 2"),
        (("layers", 0, "steps", 0, "tiles", "up", "stages"), 1e9, "no whole number from 1 to 16"),
        (("layers", 0, "steps", 0, "tiles", "down", "split_k"), 10**6, "no whole number from 1 to 64"),
        (("layers", 0, "steps", 0, "tiles", "up", "swap"), 1, "swap is 1"),
    ],
)
def test_malformed_tables_are_refused(path: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    table: Any = content()
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    read_table(file)
    part = table
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"^{file}: .*{message}"):
        read_table(file)


@pytest.mark.parametrize("text", ["", "[1, 2]", "[" * 100000, '{"version": 2}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'file'}: not a table of tiles \(.*pgsvd-vllm tune$"):
        read_table(tmp_path / "file")
    with pytest.raises(ValueError, match=r"missing\.json: cannot be read \(No such file or directory\)"):
        read_table(tmp_path / "missing.json")
