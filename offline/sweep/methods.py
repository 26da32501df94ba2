"""The methods that can be compared on one calibration."""

from dataclasses import dataclass
from typing import Any

# Method -> the options that select it. `full` is all that `compress` does; `pgsvd` has the same ranks without the
# error-aware fit and distillation, which take most of the time.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "pgsvd": {"sequential": False, "refine": 0.0},
    "uniform": {"sensitivity": "uniform"},
    "pifa": {"baseline": "pifa"},
    "svd-llm": {"baseline": "svd-llm"},
    "asvd": {"baseline": "asvd"},
    "svd": {"baseline": "svd"},
}


@dataclass(frozen=True)
class Case:
    """One size by one method.

    Attributes:
        method: a key of METHODS.
        ratio: share of the projections' parameters to remove.
    """

    method: str
    ratio: float
