"""The files of a checkpoint and a calibration set that are damaged, and what a reader may do with them.

A reader may refuse a damaged file with one line, or accept it if it means what the file meant before.
"""

import contextlib
import io
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any, TextIO, cast

import torch

from benchmarks.reliability.mutations import change_length, damage_bytes, damage_header, damage_json, flip_bits
from pgsvd_vllm.cli import inspect
from pgsvd_vllm.cli.output import Output
from pgsvd_vllm.errors import PgsvdError
from pgsvd_vllm.format.latency_table import read_latencies
from pgsvd_vllm.format.reader import Checkpoint, check_data, open_checkpoint
from pgsvd_vllm.format.schema import INDEX_NAME, REPORT_NAME, form_shapes
from pgsvd_vllm.format.writer import TensorWriter
from pgsvd_vllm.report.content import content_of

# The factored projections of the sample: (out, in, rank, form).
MODULES = {
    "model.layers.0.self_attn.q_proj": (8, 6, 2, "factors"),
    "model.layers.0.self_attn.o_proj": (6, 8, 3, "pivot"),
    "model.layers.0.mlp.experts.1.up_proj": (10, 6, 2, "pivot"),
    "lm_head": (12, 6, 3, "factors"),
}
MAX_MESSAGE = 2000


class Outcome(Enum):
    """What a reader did with a damaged file."""

    REFUSED = "refused with one line"
    EQUAL = "accepted with the same content"
    READ = "accepted, a file without a checksum"
    DIFFERENT = "accepted with other content"


class BadMessageError(AssertionError):
    """A refusal whose message a user cannot read."""


@dataclass(frozen=True, repr=False)
class Target:
    """A kind of file and its damage.

    Attributes:
        name: of the target.
        sample: the undamaged file.
        damage: makes a damaged file of a good one and a source of random numbers.
        read: reads the file as a user's command does; raises what the reader raises where that is no refusal.
        share: of the cases, beside 1 of the other targets; slow readers get less.
    """

    name: str
    sample: bytes
    damage: Callable[[bytes, Random], bytes]
    read: Callable[[bytes], Outcome]
    share: float = 1.0

    def __repr__(self) -> str:
        return f"Target({self.name!r})"


def refusal(error: PgsvdError) -> Outcome:
    """Check that the message of a refusal is one short printable line once the command has folded its white space.

    Raises:
        BadMessageError: it is not.
    """
    message = " ".join(str(error).split())
    if not message or len(message) > MAX_MESSAGE or not message.isprintable():
        raise BadMessageError(f"{type(error).__name__} with the message {message[:MAX_MESSAGE]!r}")
    return Outcome.REFUSED


def write_checkpoint(folder: Path) -> None:
    """Write a small checkpoint of two weight files with every form and kind of module."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    writer = TensorWriter(folder, max_bytes=400)
    writer.add("model.embed_tokens.weight", torch.randn(12, 6, generator=generator).bfloat16())
    writer.add("model.norm.weight", torch.ones(6))
    writer.add("model.position_ids", torch.arange(9))
    writer.add("model.layers.0.self_attn.q_proj.bias", torch.randn(8, generator=generator).half())
    rows = {}
    for name, (out, width, rank, form) in MODULES.items():
        for suffix, shape in form_shapes(form, out, width, rank).items():
            values = torch.arange(1, rank + 1).int() if suffix == "pivots" else torch.randn(shape, generator=generator)
            writer.add(f"{name}.{suffix}", values if suffix == "pivots" else values.bfloat16())
        rows[name] = {"rank": rank, "form": form}
    section: dict[str, Any] = {"quant_method": "pgsvd", "version": 1, "modules": rows, "head": "lm_head"}
    section |= {"tensors": writer.count, "method": "pgsvd", "sensitivity": "measured", "sequential": True}
    section |= {"baseline": None, "refine_minutes": None, "refine_tokens": None}
    section |= {"tolerance": {"language": 0.15}, "time_removed": None}
    section |= {"ratio": {"linear": 0.2, "total": 0.158}, "base_model": "base", "base_revision": None}
    section |= {"calibration": {"name": "text", "tokens": 64, "sha256": "0" * 64}, "tool_version": "0.1.0"}
    section |= {"command": "pgsvd-vllm compress base -o out"}
    writer.close()
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = [
        {"name": name, "out_features": out, "in_features": width, "rank": rank, "error": 0.1}
        for name, (out, width, rank, _) in MODULES.items()
    ]
    (folder / REPORT_NAME).write_text(json.dumps({"modules": report}), encoding="utf-8")


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor of the index's files, without the project's reader."""
    found = {}
    for file in set(json.loads((folder / INDEX_NAME).read_bytes())["weight_map"].values()):
        data = (folder / file).read_bytes()
        body = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:body]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = entry["dtype"], tuple(entry["shape"]), data[body + begin : body + end]
    return found


def _stored(checkpoint: Checkpoint) -> dict[str, tuple[int, str]]:
    """Module -> (rank, form)."""
    return {name: (row.rank, row.form) for name, row in checkpoint.modules.items()}


class CheckpointFile:
    """One file of a sample checkpoint in a folder of its own.

    Args:
        folder: that does not exist yet.
        pattern: of the file's name.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        write_checkpoint(folder)
        self.folder = folder
        self.path = min(folder.glob(pattern))
        self.sample = self.path.read_bytes()
        self.modules = _stored(open_checkpoint(folder))
        self.tensors = tensor_bytes(folder)

    def read(self, data: bytes) -> Outcome:
        """Write the file and read the checkpoint as `verify`, `inspect` and `report` do."""
        self.path.write_bytes(data)
        printed = io.StringIO()
        try:
            checkpoint = open_checkpoint(self.folder)
            check_data(checkpoint)
            with contextlib.redirect_stdout(cast(TextIO, Output(printed, kept="\n"))):
                inspect.run(Namespace(dir=self.folder, tp=1, revision=None))
                content_of(checkpoint, inspect.facts(checkpoint))
        except PgsvdError as error:
            return refusal(error)
        if not printed.getvalue().replace("\n", "").isprintable():
            raise BadMessageError(f"inspect prints {printed.getvalue()!r}")
        if _stored(checkpoint) == self.modules and tensor_bytes(self.folder) == self.tensors:
            return Outcome.EQUAL
        return Outcome.DIFFERENT


def read_costs(folder: Path, data: bytes) -> Outcome:
    """Write a latency table and read it."""
    path = folder / "costs.json"
    path.write_bytes(data)
    try:
        read_latencies(path)
    except PgsvdError as error:
        return refusal(error)
    return Outcome.READ


def costs_sample() -> bytes:
    """A latency table."""
    row = {"out": 8, "in": 6, "dense": 9.5, "factors": [[1, 2.0], [2, 3]], "pivot": [[1, 2.5]]}
    return json.dumps({"version": 1, "machine": "m", "tokens": 4, "dtype": "bfloat16", "shapes": [row]}).encode()


def checkpoint_targets(folder: Path) -> list[Target]:
    """The targets of the checkpoint format, which write below an empty folder."""
    shard = "pgsvd-00002-of-*.safetensors"
    wanted: list[tuple[str, str, Callable[[bytes, Random], bytes]]] = [
        ("config", "config.json", damage_json),
        ("config bytes", "config.json", damage_bytes),
        ("index", INDEX_NAME, damage_json),
        ("index bytes", INDEX_NAME, damage_bytes),
        ("header", shard, damage_header),
        ("header of the first file", "pgsvd-00001-of-*.safetensors", damage_header),
        ("data bits", shard, flip_data_bits),
        ("file bytes", shard, damage_bytes),
        ("file length", shard, change_length),
        ("report", REPORT_NAME, damage_json),
    ]
    found = []
    for name, pattern, damage in wanted:
        file = CheckpointFile(folder / name.replace(" ", "-"), pattern)
        found.append(Target(name, file.sample, damage, file.read))
    found.append(Target("latency table", costs_sample(), damage_json, lambda data: read_costs(folder, data)))
    return found


def flip_data_bits(data: bytes, random: Random) -> bytes:
    """Flip bits of a safetensors file behind its header."""
    body = 8 + int.from_bytes(data[:8], "little")
    return data[:body] + flip_bits(data[body:], random)
