"""Tensors of a staged step: rows, cuts, scores and the staged loop."""
