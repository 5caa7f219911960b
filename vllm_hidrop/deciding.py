"""What a method offers that decides, while a prompt runs, how many vision tokens stay.

Knows one image at a time; not layers' modules, not batches.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from vllm_hidrop.edits import AttentionEdit
from vllm_hidrop.merging import EncoderReduction
from vllm_hidrop.scoring import Signal, Signals

Memory = int | None
"""What a method remembers of one image between its decisions; None before the first."""


class Verdict(NamedTuple):
    """A decision about one image, on the device."""

    stays: torch.Tensor
    """bool [V], the survivors that go on."""
    event: torch.Tensor
    """bool scalar, what :meth:`Decider.remember` is told."""


class Chooser(Protocol):
    """The engine's view of a method: it ranks tokens, and the keeps of the schedule say how many stay."""

    @property
    def signal(self) -> Signal:
        """What :meth:`score` (or :meth:`Decider.judge`) reads."""

    def score(self, signals: Signals) -> torch.Tensor:
        """One float32 score per surviving vision token of one image, [V]; higher means keep."""


@runtime_checkable
class Decider(Chooser, Protocol):
    """The engine's view of a method whose keeps are upper bounds.

    The decision on entry to a stage is taken under the layer before it.
    """

    @property
    def reduction(self) -> EncoderReduction | None:
        """What happens in the vision tower, if anything does."""

    def edit(self, layer: int) -> AttentionEdit | None:
        """How the prompt's attention in ``layer`` is edited; None: not at all."""

    def judges(self, layer: int, memory: Memory) -> bool:
        """Whether there is something to decide on entry to the stage that starts at ``layer``."""

    def judge(self, signals: Signals, memory: Memory) -> Verdict:
        """Decide about one image. No host synchronisation."""

    def remember(self, memory: Memory, event: bool) -> Memory:
        """The memory after a decision."""
