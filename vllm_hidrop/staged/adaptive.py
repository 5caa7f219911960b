"""What is decided, while a step runs, about the images of prompts whose counts were only bounded.

Knows verdicts and survivors; not layers, not caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_hidrop.methods.adaptive import Decider, Memory, Verdict
from vllm_hidrop.methods.scoring import Contribution, Signals, TextAttention
from vllm_hidrop.staged.merging import Reduced
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep, Survivors

Key = tuple[int, int]
"""A request's place in the batch, and an image of its."""


@dataclass
class _Image:
    prefill: PrunedPrefill
    decider: Decider
    number: int
    survivors: npt.NDArray[np.int32]
    memory: Memory = None
    history: list[npt.NDArray[np.int32]] = field(default_factory=list)
    """Survivors of every stage so far, after those of the full prompt."""


class Decisions:
    """The survivors of every image of a step's adaptive prompts, stage by stage.

    Args:
        step: before anything is decided.
    """

    def __init__(self, step: StagedStep) -> None:
        self.images: dict[Key, _Image] = {}
        for prefill in step.prefills:
            if prefill.plan.adaptive:
                assert isinstance(prefill.chooser, Decider)
                for number, span in enumerate(prefill.plan.spans):
                    whole = np.arange(span.length, dtype=np.int32)
                    left = whole[_entering(prefill, prefill.reduced[number])] if prefill.reduced else whole
                    self.images[prefill.index, number] = _Image(prefill, prefill.chooser, number, left, history=[whole])

    def enter(self, step: StagedStep, stage: int) -> StagedStep:
        """The step with the counts that are known now for ``stage``, which bound the later ones."""
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
        """Places of an image's survivors among those of the stage before."""
        *_, before, now = self.images[key].history
        order = np.argsort(before)
        return order[np.searchsorted(before, now, sorter=order)]

    def pending(self, index: int, layer: int) -> list[int]:
        """Images of the request at ``index`` about which to decide on entry to the stage that starts at ``layer``."""
        return [
            image.number
            for key, image in self.images.items()
            if key[0] == index and image.prefill.recorded is None and len(image.survivors)
            if image.decider.judges(layer, image.memory)
        ]

    def judge(self, key: Key, layer: int, bound: int, found: Contribution | TextAttention) -> Verdict:
        """The method's verdict on one image, from the statistics of its rows."""
        image = self.images[key]
        device = found[0].device
        protected = None
        if image.prefill.reduced:
            keys = image.prefill.reduced[image.number].keys[image.survivors]
            protected = torch.from_numpy(keys).to(device)
        survivors = torch.from_numpy(image.survivors.astype(np.int64)).to(device)
        size = image.prefill.plan.spans[image.number].length
        signals = Signals(
            layer,
            bound,
            size,
            survivors,
            attention=None,
            contribution=found if isinstance(found, Contribution) else None,
            text_attention=found if isinstance(found, TextAttention) else None,
            protected=protected,
        )
        return image.decider.judge(signals, image.memory)

    def take(self, verdicts: Sequence[tuple[Key, Verdict]]) -> None:
        """Act on verdicts; one transfer to the host for all of them."""
        if not verdicts:
            return
        told = torch.cat([part.view(-1) for _, verdict in verdicts for part in verdict]).cpu().numpy()
        place = 0
        for key, verdict in verdicts:
            end = place + len(verdict.stays)
            image = self.images[key]
            image.memory = image.decider.remember(image.memory, bool(told[end]))
            image.survivors = image.survivors[told[place:end]]
            place = end + 1

    def survivors(self) -> dict[str, Survivors]:
        """By request id, what every stage ran with."""
        by_request: dict[str, list[list[npt.NDArray[np.int32]]]] = {}
        for image in self.images.values():
            by_request.setdefault(image.prefill.request_id, []).append(image.history[1:])
        return {name: tuple(zip(*histories, strict=True)) for name, histories in by_request.items()}


def _entering(prefill: PrunedPrefill, reduced: Reduced) -> npt.NDArray[np.int64]:
    """The patches of a reduced image in the order in which the language model gets them."""
    return reduced.merged_first if prefill.plan.renumbered else np.flatnonzero(reduced.alive)
