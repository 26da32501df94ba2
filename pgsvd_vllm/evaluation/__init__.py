"""Compares a checkpoint with its base: perplexity, tasks of lm_eval, and answers."""
