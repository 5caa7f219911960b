"""Accuracy of the embedded checkpoints, served: what `scripts/accuracy.py` asks, compares and writes."""
