"""Says before a run what vLLM will make of the result, for architectures that are not tested."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pgsvd_vllm.families import TESTED

if TYPE_CHECKING:
    from pgsvd_vllm.offline.planning.plan import Plan

# Seconds that vLLM may take to be imported and to build the model without weights.
LIMIT = 300


def ask_vllm(folder: str, names: Sequence[str], lm_head: str | None = None, trust: bool = False) -> dict[str, Any]:
    """The fields of `serving.name_check.NameCheck`; `reason` says why vLLM has no answer.

    vLLM runs in a process of its own, since importing it changes the threads of this one.

    Args:
        folder: of the dense model.
        names: of the modules that may be factored.
        lm_head: the LM head if it is one of them.
        trust: run code that comes with the model.
    """
    request = json.dumps({"folder": folder, "names": names, "lm_head": lm_head, "trust": trust})
    command = [sys.executable, "-m", "pgsvd_vllm.serving.name_check"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=LIMIT, env=environment, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        return {"vllm": "", "reason": f"its process ended with {type(error).__name__}"}
    return found


def serving_lines(plan: "Plan") -> Iterator[str]:
    """Lines for the user; none for a tested architecture."""
    source = plan.source
    if source.config.model_type in TESTED:
        return
    yield f"WARNING: the architecture {source.config.model_type} is not among the tested ones (docs/models.md)"
    if importlib.util.find_spec("vllm") is None:
        yield "WARNING: vLLM is not installed here, so it is not known whether its model takes the factors"
        return
    head = plan.projections.lm_head
    names = [p.name for p in (*plan.projections.flat, *([head] if head else []))]
    found = ask_vllm(str(source.folder), names, head.name if head else None, source.trust_remote_code)
    if found["reason"]:
        yield (
            f"WARNING: vLLM {found['vllm']} cannot build this model here ({found['reason']}): serve the dense model "
            "first; transformers can run the result"
        )
        return
    name = f"vLLM {found['vllm']}'s {found['model_class']}"
    if found["missing"]:
        yield (
            f"WARNING: {name} has no layer for {' '.join(found['missing'])} and would refuse the result; "
            f"repeat with --ignore {' '.join(found['missing'])} to serve it, or run it in transformers alone"
        )
    if found["dense"]:
        yield f"{name} keeps {' '.join(found['dense'])} as plain matrices: dense weights are reconstructed at load"
    if not found["missing"]:
        yield f"{name} takes the factors of all {len(names)} modules"
