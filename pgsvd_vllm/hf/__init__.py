"""transformers integration: `import pgsvd_vllm.hf`, then from_pretrained, save_pretrained and PEFT work."""

from pgsvd_vllm.hf.low_rank_linear import FactoredLinear, LowRankLinear, PivotLinear
from pgsvd_vllm.hf.quantizer import PgsvdQuantizationConfig, PgsvdQuantizer

__all__ = ["FactoredLinear", "LowRankLinear", "PgsvdQuantizationConfig", "PgsvdQuantizer", "PivotLinear"]
