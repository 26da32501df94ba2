"""Measuring the dense model: Gram matrices, loss gradients, noise responses, the LM head."""
