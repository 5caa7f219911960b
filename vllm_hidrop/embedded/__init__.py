"""The embedded models: one small real LLaVA that answers questions about synthetic scenes, trained in two forms."""

from pathlib import Path

_HERE = Path(__file__).parent
CHECKPOINTS: dict[str, Path] = {"dense": _HERE / "dense", "hidrop": _HERE / "hidrop"}
"""Checkpoint directories for ``from_pretrained`` and for vLLM, trained alike but for the schedule."""
MODEL_DIR: Path = CHECKPOINTS["hidrop"]
"""What ``hidrop serve`` serves unless told otherwise."""
MODEL_METHOD = "hidrop"
"""What the default checkpoint was trained for."""
