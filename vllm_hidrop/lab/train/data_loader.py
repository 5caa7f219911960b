"""Deals samples to the steps of every process, as batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vllm_hidrop.lab.train.conversations import Sample, Source
from vllm_hidrop.lab.train.prompts import Batch, PromptEncoder


class ShuffledPositions(Dataset[Sample]):
    """Position p of an endless run of seeded permutations, one per epoch: the same sample whenever it is asked for."""

    def __init__(self, source: Source, seed: tuple[int, ...]) -> None:
        self.source, self.seed = source, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self.source))
        if epoch != self._epoch:
            self._order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.source))
            self._epoch = epoch
        return self.source[int(self._order[place])]


@dataclass(frozen=True)
class Share:
    """One process's part of the positions: every step is ``accumulation`` batches of ``batch_size`` per process."""

    batch_size: int
    accumulation: int
    process: int = 0
    num_processes: int = 1

    @property
    def samples_per_step(self) -> int:
        """Samples that all processes together take in one step."""
        return self.batch_size * self.accumulation * self.num_processes

    def positions(self, first_step: int, end_step: int) -> Iterator[list[int]]:
        """Positions of every batch of this process, from step to step."""
        for number in range(first_step * self.accumulation, end_step * self.accumulation):
            first = (number * self.num_processes + self.process) * self.batch_size
            yield list(range(first, first + self.batch_size))


def load_batches(
    data: ShuffledPositions, encoder: PromptEncoder, share: Share, first_step: int, end_step: int, workers: int
) -> Iterator[list[Batch]]:
    """The batches of every step; PyTorch's global random generator is left alone."""
    loader = DataLoader(
        data,
        batch_sampler=share.positions(first_step, end_step),
        collate_fn=encoder.collate,
        num_workers=workers,
        generator=torch.Generator(),
    )
    batches = cast(Iterator[Batch], iter(loader))
    for _ in range(first_step, end_step):
        yield [next(batches) for _ in range(share.accumulation)]
