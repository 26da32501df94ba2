"""Judges a checkpoint beside its base: perplexity, tasks of lm_eval, and answers."""
