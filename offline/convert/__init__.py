"""Converts between checkpoints: quantized to dense, factored to dense, other tools' factors to this format."""
