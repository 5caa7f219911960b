"""The forms of a decoder layer, as the staged loop runs them."""

from enum import StrEnum


class Form(StrEnum):
    """How a decoder layer is run on a stage's rows."""

    STANDARD = "standard"
    """Part by part: norm, attention, norm, MLP on vLLM's residual pair; rows are projected once at a cut."""
    BLACK_BOX = "black box"
    """Whole, whatever is in it; the first layer behind a cut is run once to its attention, to score, and once more."""
