"""Calibration text that the dense model samples from itself."""
