"""Paired measurements against stock vLLM: the same weights, in one run."""
