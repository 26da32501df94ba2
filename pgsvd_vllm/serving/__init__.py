"""What vLLM loads: quantization config, model loader, collectives, GEMMs and layers."""
