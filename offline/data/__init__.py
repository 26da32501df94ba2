"""Calibration data: text windows, images with texts, and what they reach."""
