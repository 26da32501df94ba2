"""Bits of tensor data are flipped one at a time; `verify` must name the file. And what the checksums cost.

python benchmarks/reliability/bit_rot.py [--bits 500] [--megabytes 1000] [--json FILE]
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks.reliability import record
from benchmarks.reliability.targets import write_checkpoint
from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.checksums import file_sum
from pgsvd_vllm.format.reader import check_data, check_sums, open_checkpoint
from pgsvd_vllm.format.schema import INDEX_NAME
from pgsvd_vllm.format.writer import TensorWriter


def accepted_bits(folder: Path, count: int) -> int:
    """How many of `count` flipped bits of tensor data the checks of `verify` accept; the files are good afterwards."""
    draw, accepted = random.Random(0), 0
    files = {path: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    begins = {path: 8 + int.from_bytes(content[:8], "little") for path, content in files.items()}
    sizes = [len(content) - begins[path] for path, content in files.items()]
    for _ in range(count):
        (path,) = draw.choices(list(files), sizes)
        content = bytearray(files[path])
        bit = draw.randrange(8 * begins[path], 8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            check_data(open_checkpoint(folder))
            accepted += 1
        except CheckpointError as error:
            if path.name not in str(error):
                raise
        path.write_bytes(files[path])
    return accepted


def forget_sums(folder: Path) -> None:
    """Make the index one of a checkpoint without checksums."""
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    index["metadata"] = {}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def costs(folder: Path, megabytes: int) -> list[record.Row]:
    """Processor time of writing and checking a checkpoint of dense bfloat16 tensors, of 64 MB each."""
    folder.mkdir()
    tensor = torch.randn(4000, 8000, dtype=torch.bfloat16)
    writer = TensorWriter(folder, max_bytes=512 * 10**6)

    def write() -> None:
        for number in range(megabytes // 64):
            writer.add(f"t{number}", tensor.clone())
        writer.close()

    writing = seconds(write)
    section = {"quant_method": "pgsvd", "version": 1, "modules": {}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}), encoding="utf-8")
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 1e9
    rows = {
        "writing a checkpoint with checksums": writing,
        "of it the checksums": seconds(lambda: [file_sum(path) for path in files]),
        "`verify`, which hashes and checks every value": seconds(lambda: check(folder)),
        "`verify_checksums` of the load format": seconds(lambda: check_sums(folder)),
    }
    return [record.figure(f"{case}, seconds of a processor per GB", used / size) for case, used in rows.items()]


def seconds(action: Callable[[], object]) -> float:
    """Processor time of all threads."""
    start = time.process_time()
    action()
    return time.process_time() - start


def check(folder: Path) -> None:
    """The checks of `verify`."""
    check_data(open_checkpoint(folder))


def main() -> int:
    """Run, print and record; returns 1 if a flipped bit was accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, default=500, help="flipped, one after the other")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the checkpoint whose checks are timed")
    parser.add_argument("--json", type=Path, help="file for the record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "c"
        write_checkpoint(folder)
        accepted = accepted_bits(folder, arguments.bits)
        rows = [record.at_most(f"flipped bits of tensor data that `verify` accepts, of {arguments.bits}", accepted, 0)]
        forget_sums(folder)
        without = accepted_bits(folder, arguments.bits)
        rows.append(record.figure(f"the same without recorded checksums, of {arguments.bits}", without))
        rows += costs(Path(scratch) / "large", arguments.megabytes)
    record.show(rows)
    if arguments.json:
        record.write(arguments.json, "python benchmarks/reliability/bit_rot.py", rows)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
