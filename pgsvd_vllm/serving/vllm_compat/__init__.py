"""Every private name, patched attribute and copied protocol of vLLM, each with its reason; no other file has any."""
