"""Effect of bf16 on the logits: factored, reconstructed dense, and the dense original, each against fp32.

The question is whether factors lose more in bf16 than the dense model does. Every case runs in vLLM (eager, in a
process of its own) over the same token windows; the reference is transformers in fp32 on the same weights. All
differences are in units of logits.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.rows import write_rows
from pgsvd_vllm.format.lowrank import reconstruct
from pgsvd_vllm.format.reader import open_checkpoint, read_config

WINDOW = 64
# The factored model may lose at most this much more than the dense original does.
BAR_RATIO = 1.5
# fp32 of two implementations: rounding only.
BAR_FP32 = 1e-2


@dataclass(frozen=True)
class Row:
    """One measured figure with its bar."""

    case: str
    value: float
    bar: float | None
    ok: bool


@dataclass(frozen=True)
class Difference:
    """Logits against the reference, over all positions and the whole vocabulary."""

    maximum: float
    rms: float
    top1: float
    margin: float  # largest gap in the reference between its own choice and this model's


def compare(logits: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Both [positions, vocabulary], float32."""
    gap = logits - reference
    choice, right = logits.argmax(-1), reference.argmax(-1)
    positions = torch.arange(len(reference))
    return Difference(
        maximum=gap.abs().max().item(),
        rms=gap.double().square().mean().sqrt().item(),
        top1=(choice == right).double().mean().item(),
        margin=(reference[positions, right] - reference[positions, choice]).max().item(),
    )


def vllm_logits(folder: Path, dtype: str, windows: Path, output: Path) -> None:
    """The child process: every logit vLLM computes for the windows, saved as [positions, vocabulary]."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=256, enable_prefix_caching=False)
    seen: list[torch.Tensor] = []

    def record(model: torch.nn.Module) -> None:
        original = model.compute_logits

        def compute_logits(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            logits = original(hidden, *args, **kwargs)
            seen.append(logits.float().clone())
            return logits

        model.compute_logits = compute_logits

    llm.apply_model(record)
    rows = []
    for ids in load_file(windows)["windows"].tolist():
        seen.clear()
        # Prompt log probabilities make vLLM compute the logits of every position but the last.
        llm.generate(
            {"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False
        )
        whole = [logits for logits in seen if len(logits) == len(ids) - 1]
        if len(whole) != 1:
            raise RuntimeError(f"expected one set of prompt logits, saw the lengths {[len(x) for x in seen]}")
        rows.append(whole[0])
    save_file({"logits": torch.cat(rows)}, output)


def run_vllm(folder: Path, dtype: str, windows: Path) -> torch.Tensor:
    """`vllm_logits` in a process of its own."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **os.environ,
    }
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "logits.safetensors"
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(folder), dtype, str(windows), str(output)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"vLLM failed on {folder} in {dtype}:\n{done.stderr[-4000:]}")
        return load_file(output)["logits"]


@torch.no_grad()
def reference_logits(folder: Path, windows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Transformers on the same windows, [positions, vocabulary]."""
    from transformers import AutoModelForCausalLM

    import pgsvd_vllm.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return torch.cat([model(ids[None], use_cache=False).logits[0, :-1].float() for ids in windows])


def reconstruct_dense(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with whole matrices, in `dtype`, in place of the low-rank ones."""
    checkpoint = open_checkpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in {info.file for info in checkpoint.tensors.values()}:
        tensors.update(load_file(path))
    for name, module in checkpoint.modules.items():
        parts = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in module.suffixes}
        tensors[f"{name}.weight"] = reconstruct(parts).to(dtype)
    return tensors


def write_dense(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The checkpoint as an ordinary dense model: every low-rank matrix reconstructed, stored in `dtype`."""
    target.mkdir(parents=True)
    save_file(reconstruct_dense(folder, dtype), target / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in read_config(folder).items() if k not in ("quantization_config", "transformers_weights")}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, target / path.name)
    return target


def windows_of_text(folder: Path, text: str, count: int) -> torch.Tensor:
    """The first `count` windows of a text, [count, WINDOW]."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: count * WINDOW]
    if len(ids) < count * WINDOW:
        raise SystemExit(f"the text has {len(ids)} tokens, {count * WINDOW} needed")
    return torch.tensor(ids).view(count, WINDOW)


def measure(dense: Path, compressed: Path, text: str, count: int) -> dict[str, Difference]:
    """Case -> difference from its own fp32 reference."""
    windows = windows_of_text(compressed, text, count)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "windows.safetensors"
        save_file({"windows": windows}, saved)
        product = write_dense(compressed, Path(scratch) / "product", torch.float32)

        reference = reference_logits(dense, windows)
        found["dense original, bf16"] = compare(run_vllm(dense, "bfloat16", saved), reference)
        found["dense original, bf16, transformers"] = compare(
            reference_logits(dense, windows, torch.bfloat16), reference
        )
        reference = reference_logits(compressed, windows)
        found["factored, fp32"] = compare(run_vllm(compressed, "float32", saved), reference)
        found["factored, bf16"] = compare(run_vllm(compressed, "bfloat16", saved), reference)
        found["factored, bf16, transformers"] = compare(
            reference_logits(compressed, windows, torch.bfloat16), reference
        )
        # vLLM rounds the fp32 weights to bf16 while loading.
        found["reconstructed, bf16"] = compare(run_vllm(product, "bfloat16", saved), reference)
    return found


def rows_of(found: dict[str, Difference]) -> list[Row]:
    """Every figure as a row; bars on what must hold."""
    bars = {
        ("factored, fp32", "maximum"): BAR_FP32,
        ("factored, bf16", "rms"): BAR_RATIO * found["dense original, bf16"].rms,
    }
    rows = []
    for case, difference in found.items():
        for figure, value in asdict(difference).items():
            bar = bars.get((case, figure))
            rows.append(Row(f"{case}: {figure}", value, bar, bar is None or value <= bar))
    return rows


def main() -> int:
    """Print the table; status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dense", type=Path, help="the original model's folder")
    parser.add_argument("compressed", type=Path, help="the same model, written by pgsvd-vllm compress")
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve().parent.parent.parent / "LICENSE")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    arguments = parser.parse_args()

    found = measure(arguments.dense, arguments.compressed, arguments.text.read_text("utf-8"), arguments.windows)
    print(f"{'case':36} {'max':>9} {'RMS':>9} {'same top-1':>11} {'margin':>8}")
    for case, d in found.items():
        print(f"{case:36} {d.maximum:9.5f} {d.rms:9.6f} {d.top1:11.2%} {d.margin:8.4f}")
    rows = rows_of(found)
    for row in rows:
        if row.bar is not None:
            print(f"{row.case}: {row.value:.6f}, bar {row.bar:.6f}: {'good' if row.ok else 'MISSED'}")
    write_rows(arguments.json, [asdict(row) for row in rows])
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        vllm_logits(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
        sys.exit(0)
    sys.exit(main())
