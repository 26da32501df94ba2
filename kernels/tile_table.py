"""Measured tiles of one kind of GPU, in a JSON file that `tune` writes and the engine reads when it loads a model.

The file maps layer sizes to the tiles of some numbers of tokens. A layer uses the tiles of the most similar layer that
was measured, or the default tiles if none is similar.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pgsvd_vllm.kernels.layer_shape import LayerShape
from pgsvd_vllm.kernels.tile_heuristics import MOST_TOKENS, Step, Steps, Tile, Tiles

TABLE_VERSION = 2
# Layers are similar whose sizes differ by no more than this.
SIMILAR = 1.25
# Larger than any kernel that can be compiled.
MOST_BLOCK, MOST_WARPS, MOST_STAGES, MOST_SPLIT = 512, 32, 16, 64
MOST_SIZE = 1 << 31


@dataclass
class Table:
    """The tiles of a GPU.

    Attributes:
        device: the GPU's name.
        layers: sizes -> steps.
    """

    device: str
    layers: dict[LayerShape, Steps] = field(default_factory=dict)

    def steps(self, sizes: LayerShape) -> Steps | None:
        """The steps of the most similar layer; None if no layer of the table is similar."""
        nearest = min(self.layers, key=sizes.distance, default=None)
        return self.layers[nearest] if nearest is not None and sizes.distance(nearest) <= SIMILAR else None


def default_path(device: str) -> Path:
    """Where the table of a GPU of a name is kept: in the user's cache."""
    # Unlike Path.home, not an error where there is none.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "pgsvd-vllm" / "kernels" / (re.sub(r"[^A-Za-z0-9.-]+", "_", device) + ".json")


def write_table(table: Table, path: Path) -> None:
    """Write the file, complete or not at all; raises OSError."""
    layers = []
    for sizes, steps in table.layers.items():
        rows: list[dict[str, Any]] = []
        for step in steps:
            tiles = None
            if step.tiles is not None:
                down, up = step.tiles
                tiles = {"down": None if down is None else asdict(down), "up": asdict(up)}
            rows.append({"most_tokens": step.most_tokens, "tiles": tiles})
        layers.append({**asdict(sizes), "steps": rows})
    content = {"version": TABLE_VERSION, "device": table.device, "layers": layers}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.writing")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read_table(path: Path) -> Table:
    """Read and check a file.

    Raises:
        ValueError: the file cannot be read, is not such a table, or has impossible tiles; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != TABLE_VERSION:
            raise ValueError(f"version {content['version']}, this program reads {TABLE_VERSION}")
        layers = {_sizes(row): _steps(row["steps"]) for row in content["layers"]}
        return Table(str(content["device"]), layers)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path}: not a table of tiles ({type(error).__name__}: {error}); make it with pgsvd-vllm tune"
        ) from None


def _sizes(row: Mapping[str, Any]) -> LayerShape:
    columns, rows = (_whole(row[name], 1, MOST_SIZE) for name in ("columns", "rows"))
    heights, rank, shards = (_whole(row[name], 0, MOST_SIZE) for name in ("heights", "rank", "shards"))
    # Only layers of 16 bits are tuned; older tables do not say so.
    return LayerShape(
        columns, rows, heights, rank, shards, _flag(row, "scattered"), _whole(row.get("bits", 16), 16, 16)
    )


def _steps(rows: list[Mapping[str, Any]]) -> Steps:
    steps = tuple(
        Step(
            _whole(row["most_tokens"], 1, MOST_TOKENS),
            None if row["tiles"] is None else _tiles(row["tiles"]),
        )
        for row in rows
    )
    if not steps or any(a.most_tokens >= b.most_tokens for a, b in pairwise(steps)):
        raise ValueError("numbers of tokens must ascend")
    return steps


def _tiles(row: Mapping[str, Any]) -> Tiles:
    return None if row["down"] is None else _tile(row["down"]), _tile(row["up"])


def _tile(row: Mapping[str, Any]) -> Tile:
    swap = _flag(row, "swap")
    block_m, block_out, block_k = (
        _whole(row[name], 16, MOST_BLOCK, power=True) for name in ("block_m", "block_out", "block_k")
    )
    warps, stages = _whole(row["warps"], 1, MOST_WARPS, power=True), _whole(row["stages"], 1, MOST_STAGES)
    return Tile(block_m, block_out, block_k, warps, stages, _whole(row["split_k"], 1, MOST_SPLIT), swap)


def _flag(row: Mapping[str, Any], name: str) -> bool:
    if not isinstance(row[name], bool):
        raise TypeError(f"{name} is {row[name]!r}")
    return row[name]


def _whole(value: Any, least: int, most: int, power: bool = False) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    if power and value & (value - 1):
        raise ValueError(f"{value} is no power of 2")
    return value
