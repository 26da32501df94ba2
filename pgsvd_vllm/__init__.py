"""Low-rank (PGSVD) compressed models for vLLM.

This package is light: importing it loads neither torch nor vLLM. The parts are
`format`, `parallel`, `serving` (what vLLM loads through `plugin`), `hf` (transformers) and `cli`.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a source tree `offline/` and `kernels/` lie beside this package, not in it. An installed wheel
# has them inside; here the checkout joins the search path so that both look the same.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "offline").is_dir():
    __path__.append(str(_checkout))
