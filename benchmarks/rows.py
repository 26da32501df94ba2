"""The JSON file of a benchmark's rows: what `--json FILE` of every benchmark writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, each with at least `case`, `value`, `bar` (None without one) and `ok`.

    Args:
        path: of the file; None writes nothing.
        rows: to write.
    """
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
