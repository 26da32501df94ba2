"""The README's command without a data set: quality on text of other kinds, questions kept, and its time.

    python benchmarks/default_text.py --wikitext DIR --c4 FILE [--ratio 0.2] [--refine 15] [--quick] [--json FILE]

SmolLM2-135M-Instruct is compressed by the command line on text that it samples from itself; the text and its
calibration are made in this run, unless --keep names the folder of another one. Perplexities are multiples of dense on
the windows of quality.py --quick: WikiText-2's test text, and every second document of FILE. --quick compresses on 8
windows, without bars.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import pgsvd_vllm.hf  # noqa: E402, F401  (registers the format)
from benchmarks.quality import LENGTH, paper_form  # noqa: E402
from benchmarks.questions import KEPT, answers, kept, questions  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from pgsvd_vllm.evaluation.perplexity import perplexity, spread_windows  # noqa: E402
from pgsvd_vllm.offline.data.text import load_tokenizer, read_documents  # noqa: E402
from tests.support import reference_model  # noqa: E402

WINDOWS = 15
MINUTES = 15.0
# Multiples of dense at 20 %, by default and with 15 minutes of distillation.
BARS = {"wikitext": (1.25, 1.17), "c4": (1.14, 1.10)}


def compressed(dense: Path, work: Path, options: list[str]) -> tuple[Path, float]:
    """The folder that the command writes, and its minutes."""
    output = Path(tempfile.mkdtemp(dir=work)) / "compressed"
    command = [str(Path(sys.executable).with_name("pgsvd-vllm")), "compress", str(dense), "-o", str(output), *options]
    command += ["--calibration", str(work / "calibration")]
    print("$", " ".join(command), flush=True)
    start = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(work / "cache")})
    return output, (time.monotonic() - start) / 60


def perplexities(folder: Path, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity on each text, in the stored dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return {name: perplexity(model, ids, desc=f"{folder.name} {name}") for name, ids in windows.items()}


def main() -> int:
    """Compress, measure, print, write; the status is 0 where every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, metavar="DIR", help="has wiki.test.raw")
    parser.add_argument("--c4", type=Path, required=True, metavar="FILE", help=".jsonl with a text field")
    parser.add_argument("--ratio", type=float, default=0.2, metavar="R")
    parser.add_argument("--refine", metavar="MINUTES|TOKENS", help="as of the command; no bars but with 15")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="8 windows, no bars")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work there, and begin with the text and the calibration there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows {case, value, bar, ok}")
    arguments = parser.parse_args()
    dense = reference_model.smollm2()
    documents = list(read_documents(str(arguments.c4), 4 * WINDOWS * LENGTH, load_tokenizer(dense)))
    texts = {
        "wikitext": [paper_form((arguments.wikitext / "wiki.test.raw").read_text(encoding="utf-8"))],
        "c4": documents[1::2],
    }
    tokenizer = load_tokenizer(dense)
    windows = {name: spread_windows(tokenizer, text, WINDOWS, LENGTH) for name, text in texts.items()}
    options = ["--ratio", str(arguments.ratio), "--seed", str(arguments.seed)]
    options += [] if arguments.refine is None else ["--refine", arguments.refine]
    options += ["--num-calibration-samples", "8"] if arguments.quick else []
    rows: list[dict[str, Any]] = []
    barred = arguments.ratio == 0.2 and not arguments.quick and arguments.refine in (None, "15")

    def row(case: str, value: float, bar: float | None, ok: bool) -> None:
        rows.append({"case": case, "value": value, "bar": bar if barred else None, "ok": ok or not barred})

    with tempfile.TemporaryDirectory() as name:
        work = arguments.keep or Path(name)
        work.mkdir(exist_ok=True)
        folder, minutes = compressed(dense, work, options)
        if arguments.refine is None:
            row("minutes", minutes, MINUTES, minutes <= MINUTES)
        before, after = (perplexities(path, windows) for path in (dense, folder))
        for text, bars in BARS.items():
            bar = bars[arguments.refine is not None]
            row(f"{text}, multiple of dense", after[text] / before[text], bar, after[text] <= bar * before[text])
        asked = questions()
        same, known = kept(asked, answers(dense, asked), answers(folder, asked))
        row(f"questions kept of {known}, in %", 100 * same / known, KEPT, 100 * same >= KEPT * known)
    for found in rows:
        bar = "" if found["bar"] is None else f"  bar {found['bar']}  {'ok' if found['ok'] else 'MISSED'}"
        print(f"{found['case']:36} {found['value']:.4g}{bar}")
    write_rows(arguments.json, rows)
    return 0 if all(found["ok"] for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
