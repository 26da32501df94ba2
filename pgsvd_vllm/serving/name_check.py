"""What vLLM makes of a model's projections, before they are factored: the layers of its own model that take them.

    python -m pgsvd_vllm.serving.name_check        # JSON on standard input and, as the last line, on standard output

vLLM's model is built on the meta device with factors of rank 1 for every module that may be factored.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import vllm

from pgsvd_vllm.format.schema import FORMAT_VERSION, QUANT_METHOD, parse_modules
from pgsvd_vllm.serving.dense_fallback import patterns
from pgsvd_vllm.serving.model_loader import claim_left_out
from pgsvd_vllm.serving.quant_config import PgsvdConfig
from pgsvd_vllm.serving.vllm_compat.meta_model import meta_model


@dataclass(frozen=True)
class NameCheck:
    """What vLLM makes of a model.

    Attributes:
        vllm: its version.
        model_class: of vLLM, that runs the model; empty if it cannot be built here.
        reason: why it cannot; else empty.
        dense: patterns for `ignore` that match the modules whose dense weights vLLM gets, reconstructed at load.
        missing: those that match the modules for which vLLM's model has no layer, so that it refuses the checkpoint.
    """

    vllm: str
    model_class: str = ""
    reason: str = ""
    dense: Sequence[str] = ()
    missing: Sequence[str] = ()


def check_names(folder: str, names: Sequence[str], lm_head: str | None = None, trust: bool = False) -> NameCheck:
    """Build vLLM's model and find the layers that take the factors.

    Args:
        folder: of the dense model.
        names: of the modules that may be factored, as the checkpoint names them.
        lm_head: the LM head if it is one of them.
        trust: run code that comes with the model.
    """
    modules = {name: {"rank": 1, "form": "factors"} for name in names}
    section = {"quant_method": QUANT_METHOD, "version": FORMAT_VERSION, "modules": modules, "head": lm_head}
    config = PgsvdConfig(parse_modules(section, "config.json"))
    try:
        model, vllm_config = meta_model(folder, config, trust)
        claim_left_out(model, config, vllm_config)
    except Exception as error:  # vLLM's classes refuse sizes, devices and options in many ways
        lines = str(error).strip().splitlines() or [""]
        return NameCheck(vllm.__version__, reason=f"{type(error).__name__}: {lines[0][:300]}")
    dense = patterns(config.dense_fallbacks(model))
    return NameCheck(vllm.__version__, type(model).__name__, "", dense, patterns(config.unclaimed()))


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    print(json.dumps(asdict(check_names(**request))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
