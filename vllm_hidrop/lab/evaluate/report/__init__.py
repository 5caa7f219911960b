"""The accuracy document of the embedded checkpoints: what `scripts/accuracy.py` serves, asks, compares and writes."""
