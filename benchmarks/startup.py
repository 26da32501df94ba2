"""Start-up seconds of a factored model in vLLM on CPU relative to dense, and the number of compiled graphs.

    python benchmarks/startup.py [--quick] [--json FILE]

The models are those of random_model.py. Cold starts have empty compilation caches, warm starts the caches of the cold
ones; dense and factored starts alternate. To count graphs, vLLM compiles layer by layer, as it does on GPUs: layers of
different ranks must share graphs as the dense model's layers do.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import random_model
from benchmarks.rows import write_rows
from benchmarks.serve_cpu import FORMS, Engine, engine_options
from tests.support import reference_model

RATIO = 0.4
# Multiple of the dense model's time.
BAR = 1.1


def start(folder: Path, caches: Path, **options: Any) -> dict[str, Any]:
    """Start an engine, end it, and return its start-up measurements."""
    environment = {"VLLM_CACHE_ROOT": str(caches / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    log = reference_model.cache_folder() / f"startup-{folder.name}.log"
    with Engine(folder, log, {**engine_options(), **options}, environment) as engine:
        return engine.start


def main() -> int:
    """Measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one start of each kind instead of three")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    folders = {"dense": random_model.folder(), **{form: random_model.folder(form, RATIO) for form in FORMS}}
    found: dict[tuple[str, str], list[float]] = {}
    for folder in folders.values():  # into the page cache
        for file in folder.glob("*.safetensors"):
            file.read_bytes()
    for _ in range(1 if arguments.quick else 3):
        for name, folder in folders.items():
            with tempfile.TemporaryDirectory() as caches:
                for kind in ("cold", "warm"):
                    found.setdefault((kind, name), []).append(start(folder, Path(caches))["seconds"])
    rows: list[dict[str, Any]] = []
    for kind in ("cold", "warm"):
        dense = statistics.median(found[kind, "dense"])
        for form in FORMS:
            seconds = statistics.median(found[kind, form])
            bar = BAR if kind == "cold" else None
            value = seconds / dense
            case = f"{kind} start, {form} {RATIO:.0%}"
            rows.append({"case": case, "value": value, "bar": bar, "ok": bar is None or value <= bar})
            rows[-1] |= {"dense seconds": dense, "factored seconds": seconds}
    graphs = {}
    for name, folder in folders.items():
        with tempfile.TemporaryDirectory() as caches:
            counts = start(folder, Path(caches), piecewise=True)["compiled"]
        graphs[name] = counts["num_compiled_artifacts_saved"]
    for form in FORMS:
        case = f"graphs compiled layer by layer, {form} {RATIO:.0%}"
        ok = graphs[form] == graphs["dense"] > 0
        rows.append({"case": case, "value": graphs[form], "bar": graphs["dense"], "ok": ok})
    for row in rows:
        bar = "" if row["bar"] is None else f", bar {row['bar']:g} {'ok' if row['ok'] else 'MISSED'}"
        more = f" ({row['dense seconds']:.1f} -> {row['factored seconds']:.1f} s)" if "dense seconds" in row else ""
        print(f"{row['case']:45} {row['value']:.3g}{more}{bar}")
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
