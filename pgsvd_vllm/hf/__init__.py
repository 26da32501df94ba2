"""transformers integration: `import pgsvd_vllm.hf`, then from_pretrained and save_pretrained work."""

from pgsvd_vllm.hf.quantizer import FactoredLinear, LowRankLinear, PgsvdQuantizationConfig, PgsvdQuantizer, PivotLinear

__all__ = ["FactoredLinear", "LowRankLinear", "PgsvdQuantizationConfig", "PgsvdQuantizer", "PivotLinear"]
