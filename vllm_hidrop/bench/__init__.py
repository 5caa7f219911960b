"""Paired measurements against stock vLLM on the same weights, in one run."""
