"""What `compress` would take for large models on H100s: computed from shapes and assumed rates, not measured.

    python benchmarks/compress_cost.py [--quick] [--json FILE]

The default method without distillation, plain factors, 128 windows of 1024 tokens, 64 of them for gradients. Operations
are counted as the code makes them; the rates are assumptions, printed with the table. Workers share the samples in at
most eight parts. Spectra and fits are shared too, but a layer's groups of projections are fitted one after the other,
and the command itself computes their targets.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_model import Shape, projections
from benchmarks.rows import write_rows
from pgsvd_vllm.offline.calibration.gradients import GRADIENT_TOKENS
from pgsvd_vllm.offline.factors.error_aware import SEQUENTIAL_TOKENS
from pgsvd_vllm.offline.model.batch import BLOCKS

SHAPES = {
    "8B": Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128256),
    "70B": Shape("llama-3.1-70b", 8192, 28672, 80, 64, 8, 128256),
    "405B": Shape("llama-3.1-405b", 16384, 53248, 126, 128, 8, 128256),
}
CALIBRATION_TOKENS = 128 * 1024
# Assumed for an H100: FLOPs per second of GEMMs in bf16 (40 % of the peak), float32 without TF32 (70 % of the vector
# units) and float64 (70 % of the tensor cores); n^3 per second of an eigendecomposition in float64, and the share of it
# that eigenvalues alone take; and seconds of calls that the size of a projection does not change.
RATES = {"bf16": 4e14, "float32": 4.7e13, "float64": 4.7e13}
EIGEN_RATE, VALUES_SHARE = 1e11, 0.4
CALL_SECONDS = 0.1
# Bytes per second from the disk to each worker, and of sums to the command through Ray's object store.
DISK_RATE, STORE_RATE = 2e9, 5e9
MACHINES = {"1 H100": (1, STORE_RATE), "8 H100": (8, STORE_RATE), "Ray, 8 nodes of 1 H100": (8, 1.2e9)}
HOUR = 3600.0
# 70B on one node of eight GPUs within an hour.
BAR = ("70B", "8 H100")


@dataclass(frozen=True)
class Matrix:
    """A projection: its kind, outputs and inputs."""

    kind: str
    out: int
    width: int

    @property
    def small(self) -> int:
        """Size of the matrix whose eigenvalues are needed."""
        return min(self.out, self.width)

    @property
    def product(self) -> float:
        """FLOPs of W C."""
        return 2.0 * self.out * self.width**2

    @property
    def roots(self) -> float:
        """FLOPs of the Cholesky factor of C, where there are more outputs than inputs."""
        return self.width**3 / 3 if self.out > self.width else 0.0

    @property
    def metric(self) -> float:
        """FLOPs of the Cholesky factor L of G, and of L^T W."""
        return self.out**3 / 3 + 2.0 * self.out**2 * self.width


def layer_of(shape: Shape) -> list[Matrix]:
    """The projections of one layer."""
    return [Matrix(kind, rows, columns) for name, kind, _, rows, columns in projections(shape) if ".layers.0." in name]


def work(float64: float, eigen: float) -> float:
    """Seconds of one projection's float64 computations."""
    return float64 / RATES["float64"] + eigen / EIGEN_RATE + CALL_SECONDS


def makespan(times: Iterable[float], workers: int) -> float:
    """Seconds until all tasks are done, the longest first."""
    free = [0.0] * workers
    for seconds in sorted(times, reverse=True):
        free[free.index(min(free))] += seconds
    return max(free)


def stages(shape: Shape, workers: int, store: float) -> Counter[str]:
    """Stage -> seconds of one model."""
    row = layer_of(shape)
    hidden, wide, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    numel = sum(p.out * p.width for p in row)
    inputs = 3 * hidden**2 + wide**2  # q, o, gate and down have an input of their own
    shared = min(workers, BLOCKS)
    sent = 4 * BLOCKS / 2 / store if workers > 1 else 0.0  # seconds for an element of the sums of all blocks
    reading = 2 * numel / DISK_RATE
    spectra = [work(2 * p.product + p.roots, VALUES_SHARE * p.small**3) for p in row]
    losses = [work(2 * p.product + p.roots + p.metric, VALUES_SHARE * p.small**3) for p in row]
    fits = {p.kind: work(5 * p.product + p.roots + p.metric, p.small**3) for p in row}
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    targets = sum(work(3.0 * n**3, 0) for n in (hidden, hidden, hidden, wide))
    found: Counter[str] = Counter()
    found["calibration"] = layers * (
        reading
        + CALIBRATION_TOKENS * (2 * numel / RATES["bf16"] + inputs / RATES["float32"]) / shared
        + makespan(spectra, workers)
        + sent * inputs
    )
    moments = sum(p.out**2 + p.width**2 for p in row)
    predictions = 6.0 * GRADIENT_TOKENS * shape.vocab_size * hidden / RATES["bf16"] / shared
    found["gradients"] = predictions + layers * (
        reading
        + GRADIENT_TOKENS * (6 * numel / RATES["bf16"] + moments / RATES["float32"]) / shared
        + makespan(losses, workers)
        + sent * moments
    )
    tokens = min(CALIBRATION_TOKENS, SEQUENTIAL_TOKENS)
    sums = 3 * inputs + 2 * hidden * (hidden + wide)
    found["factors"] = layers * (
        reading
        + tokens * (4 * numel / RATES["bf16"] + sums / RATES["float32"]) / shared
        + targets
        + sum(makespan((fits[kind] for kind in group), workers) for group in groups)
        + sent * sums
    )
    return found


def main() -> int:
    """Compute, print, write; the status is 0 where the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the same, which takes no time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(f"assumed FLOP/s {RATES}, n^3/s of eigenvectors {EIGEN_RATE:.0e}, bytes/s of disk {DISK_RATE:.0e}")
    rows, ok = [], True
    for name, shape in SHAPES.items():
        for machine, (workers, store) in MACHINES.items():
            found = stages(shape, workers, store)
            total = sum(found.values())
            parts = ", ".join(f"{stage} {seconds / 60:.0f}" for stage, seconds in found.items())
            print(f"{name:5} {machine:24} {total / 60:6.0f} min ({parts})")
            bar = HOUR if (name, machine) == BAR else None
            ok = ok and (bar is None or total <= bar)
            rows.append(
                {"case": f"{name}, {machine}, s", "value": total, "bar": bar, "ok": bar is None or total <= bar}
            )
    write_rows(arguments.json, rows)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
