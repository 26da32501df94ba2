"""vLLM's methods for factored layers: linear, LM head, MoE experts, dense neighbours."""
