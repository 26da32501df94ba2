"""Tensor parallelism of factored layers, without vLLM: slicing, communication plan, preview."""
