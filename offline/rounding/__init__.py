"""Rounding of factors and dense weights to 8 and 4 bits."""
