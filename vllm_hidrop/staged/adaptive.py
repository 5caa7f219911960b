"""The images of a step's adaptive prompts: their survivors, stage by stage, as the methods decide."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.methods.adaptive import Adaptive, Memory, Verdict
from vllm_hidrop.methods.scoring import Signals, Statistic
from vllm_hidrop.staged.image_runs import Key
from vllm_hidrop.staged.merging import Reduced
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep, Survivors


@dataclass
class AdaptiveImage:
    """One image of an adaptive prompt.

    Attributes:
        number: index of the image in the prompt.
        survivors: int32, the tokens that enter the next stage: zero-based inside the image, in row order.
        memory: what the method remembers of the image, see ``Adaptive.remember``.
        history: all tokens of the image, then the survivors of every stage so far.
    """

    prefill: PrunedPrefill
    number: int
    survivors: npt.NDArray[np.int32]
    memory: Memory = None
    history: list[npt.NDArray[np.int32]] = field(default_factory=list)

    @classmethod
    def of(cls, prefill: PrunedPrefill, number: int) -> "AdaptiveImage":
        """An image before the first stage: its survivors are all tokens, or those that the vision tower left."""
        whole = np.arange(prefill.plan.spans[number].length, dtype=np.int32)
        left = whole[_patches_in_order(prefill, prefill.reduced[number])] if prefill.reduced else whole
        return cls(prefill, number, left, history=[whole])

    def signals(self, layer: int, bound: int, statistic: Statistic) -> Signals:
        """What the method looks at: on entry to the stage that starts at ``layer`` and keeps at most ``bound``."""
        device = statistic[0].device
        survivors = async_tensor_h2d(self.survivors.astype(np.int64), device=device)
        protected = None
        if self.prefill.reduced:
            protected = async_tensor_h2d(self.prefill.reduced[self.number].keys[self.survivors], device=device)
        return Signals(layer, bound, self.prefill.plan.spans[self.number].length, survivors, statistic, protected)


class AdaptiveImages:
    """All images of a step's adaptive prompts."""

    def __init__(self, step: StagedStep) -> None:
        self.images = {
            (prefill.index, number): AdaptiveImage.of(prefill, number)
            for prefill in step.prefills
            if prefill.plan.adaptive
            for number in range(len(prefill.plan.spans))
        }

    def enter(self, step: StagedStep, stage: int) -> StagedStep:
        """The step with the decided counts in ``stage``, which bound the later stages' counts."""
        kept: dict[int, list[int]] = {}
        bounds = {prefill.index: prefill.plan.kept[stage] for prefill in step.prefills}
        for (index, number), image in self.images.items():
            if image.prefill.recorded is not None:
                image.survivors = image.prefill.recorded[stage][number]
            if bounds[index][number] == 0:
                image.survivors = image.survivors[:0]
            image.history.append(image.survivors)
            kept.setdefault(index, []).append(len(image.survivors))
        return step.bounded(stage, kept)

    def selection(self, key: Key) -> npt.NDArray[np.int64]:
        """Indices of an image's survivors among those of the stage before, int64 [keep]."""
        *_, before, now = self.images[key].history
        order = np.argsort(before)
        return order[np.searchsorted(before, now, sorter=order)]

    def undecided(self, index: int, layer: int) -> list[int]:
        """Images of the request at ``index`` that need a decision on entry to the stage that starts at ``layer``."""
        return [
            image.number
            for key, image in self.images.items()
            if key[0] == index and image.prefill.recorded is None and len(image.survivors)
            if decider(image.prefill).judges(layer, image.memory)
        ]

    def decide(self, layer: int, bounds: Mapping[Key, int], statistics: Mapping[Key, Statistic]) -> None:
        """Decide which tokens enter the stage that starts at ``layer``; one transfer to the host for all images."""
        verdicts: dict[Key, Verdict] = {}
        for key, statistic in statistics.items():
            image = self.images[key]
            verdicts[key] = decider(image.prefill).judge(image.signals(layer, bounds[key], statistic), image.memory)
        if not verdicts:
            return
        flags = torch.cat([part.view(-1) for verdict in verdicts.values() for part in verdict]).cpu().numpy()
        start = 0
        for key, verdict in verdicts.items():
            end = start + len(verdict.stays)
            image = self.images[key]
            image.memory = decider(image.prefill).remember(image.memory, bool(flags[end]))
            image.survivors = image.survivors[flags[start:end]]
            start = end + 1

    def survivors(self) -> dict[str, Survivors]:
        """By request id, the survivors in every stage."""
        by_request: dict[str, list[list[npt.NDArray[np.int32]]]] = {}
        for image in self.images.values():
            by_request.setdefault(image.prefill.request_id, []).append(image.history[1:])
        return {name: tuple(zip(*histories, strict=True)) for name, histories in by_request.items()}


def decider(prefill: PrunedPrefill) -> Adaptive:
    """The method of an adaptive prompt."""
    assert isinstance(prefill.method, Adaptive)
    return prefill.method


def _patches_in_order(prefill: PrunedPrefill, reduced: Reduced) -> npt.NDArray[np.int64]:
    """The patches that a tower left of an image, in the order in which the language model gets them, int64 [V']."""
    return reduced.merged_first if prefill.plan.renumbered else np.flatnonzero(reduced.alive)
