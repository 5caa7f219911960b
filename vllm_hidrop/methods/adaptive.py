"""The base class of adaptive methods, and the attention edits and encoder reductions that they may ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isqrt
from typing import Any, ClassVar, NamedTuple

import torch

from vllm_hidrop.methods.base import Method
from vllm_hidrop.methods.scoring import Signals


class Sight(StrEnum):
    """What text rows see of each image."""

    FIRST = "first"
    """Its first token, which gets the weight of all its tokens unless the edit renormalises."""
    SECOND_HALF = "second_half"
    NONE = "none"


@dataclass(frozen=True)
class AttentionEdit:
    """An edit of the attention weights of one layer (VisiPruner sections 3.3 and 3.6, and its released code).

    Attributes:
        text_sees: what text rows see of the images.
        vision_is_blind: whether vision rows see no vision token, themselves included.
        renormalise: True masks the tokens before the softmax; False edits the weights after it, so that a row's may sum
            to less than 1. A row that sees nothing has output 0.
    """

    text_sees: Sight
    vision_is_blind: bool
    renormalise: bool


class KeyLayer(StrEnum):
    """Whose class-token attention names the key tokens."""

    LAST = "last"
    """The tower's last layer, as in the paper."""
    FEATURE = "feature"
    """The last layer that the image features need, which is loaded anyway: a deviation."""


@dataclass(frozen=True)
class EncoderReduction:
    """A method's encoder selection, inside the vision tower.

    Attributes:
        merge_threshold: windows whose tokens' mean pairwise cosine reaches it become one token; None: no merging.
        merge_window: side of a window, in patches; divides the grid's side.
        key_rate: share of the tokens left that are key tokens, rounded up.
        key_layer: the layer whose class row ranks them.
    """

    merge_threshold: float | None
    merge_window: int
    key_rate: float
    key_layer: KeyLayer

    @property
    def name(self) -> str:
        """A name that is equal for reductions that make the same features of an image."""
        return f"merge {self.merge_threshold} of {self.merge_window}, keys {self.key_rate} of {self.key_layer}"

    def check(self, num_patches: int) -> None:
        """Raise ValueError, which says what else to set, where the windows do not tile a tower's patches."""
        side = isqrt(num_patches)
        if self.merge_threshold is not None and (side * side != num_patches or side % self.merge_window):
            raise ValueError(
                f"merge_window {self.merge_window} does not tile the tower's {num_patches} patches as a square grid; "
                "set another, or merge_threshold null"
            )


Memory = int | None
"""What a method remembers of one image from decision to decision; None before the first."""


class Verdict(NamedTuple):
    """A decision about one image's V survivors, on the device."""

    stays: torch.Tensor
    """bool [V], the tokens that stay."""
    event: torch.Tensor
    """bool scalar, handed to :meth:`Adaptive.remember`."""


@dataclass(frozen=True)
class Adaptive(Method):
    """Base of the methods that decide while a prompt runs how many tokens stay.

    The keeps of the schedule are upper bounds. There is no score: :meth:`judge` decides on entry to a stage, by signals
    of the layer before it.
    """

    without_reduction: ClassVar[Mapping[str, Any]] = {}
    """The options that switch :attr:`reduction` off, and their values."""

    @property
    def reduction(self) -> EncoderReduction | None:
        """The encoder selection; None: none."""
        return None

    def edit(self, layer: int) -> AttentionEdit | None:
        """The edit of the prompt's attention in ``layer``; None: none."""
        return None

    def judges(self, layer: int, memory: Memory) -> bool:
        """Whether the method decides on entry to the stage that starts at ``layer``."""
        raise NotImplementedError

    def judge(self, signals: Signals, memory: Memory) -> Verdict:
        """Decide about one image. No host synchronisation."""
        raise NotImplementedError

    def remember(self, memory: Memory, event: bool) -> Memory:
        """The memory after a decision, from the memory before it and the verdict's event."""
        return memory
