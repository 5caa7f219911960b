"""The embedded model: a small real LLaVA that answers questions about synthetic scenes."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Checkpoint directory for ``from_pretrained`` and for vLLM."""
