"""What a method may ask the engine to compute at a cut, by name."""

from enum import StrEnum


class Signal(StrEnum):
    """What a scorer needs the engine to compute at a cut."""

    NEXT_ATTENTION = "next_attention"
    """Last prompt row's attention under the Q and K of the first layer of the new stage, on all current rows."""
    PREVIOUS_ATTENTION = "previous_attention"
    """The same under the Q and K of the last layer of the old stage, as that layer ran."""
    CONTRIBUTION = "contribution"
    """What each vision token adds to the last prompt row's attention output, in the last layer of the old stage."""
    TEXT_ATTENTION = "text_attention"
    """Attention of all text rows after the image, in the last layer of the old stage."""
    NONE = "none"
    """Nothing: the score depends on the token's place only."""
