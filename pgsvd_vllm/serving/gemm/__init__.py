"""The GEMMs of a loaded factored layer, on CPUs and on GPUs, and their latencies."""
