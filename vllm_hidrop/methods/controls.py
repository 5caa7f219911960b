"""Naive controls: a method that cannot beat these has learned nothing from the attention it reads."""

from dataclasses import dataclass

import torch

from vllm_hidrop.methods.base import Method, ModelShape
from vllm_hidrop.methods.scoring import Signals, random_score, uniform_score
from vllm_hidrop.plan.schedule import KeepValue, Schedule


@dataclass(frozen=True)
class Random(Method):
    """Keep a seeded random subset of each image.

    **Source** the control of arXiv 2502.11501. **Differs** the subset depends only on the seed, the layer and the
    token's place, so a request always keeps the same tokens.

    **Options** ``layer`` (zero-based first pruned layer, default 2), ``keep`` (fraction or count, default 0.5),
    ``seed``.
    """

    name = "random"
    paper = "control"
    summary = "all, then a seeded random subset"

    layer: int = 2
    keep: KeepValue = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    def schedule(self, shape: ModelShape) -> Schedule:
        """All, then ``keep`` from ``layer`` on."""
        return Schedule.of({0: "all"} | {self.layer: self.keep}, shape.num_layers)

    def score(self, signals: Signals) -> torch.Tensor:
        """A seeded random number per token."""
        return random_score(signals, self.seed)


@dataclass(frozen=True)
class Uniform(Method):
    """Keep evenly spaced tokens in reading order.

    **Source** none (a spatial subsampling control). **Differs** nothing.

    **Options** ``layer`` (zero-based first pruned layer, default 2), ``keep`` (fraction or count, default 0.5).
    """

    name = "uniform"
    paper = "control"
    summary = "all, then evenly spaced tokens"

    layer: int = 2
    keep: KeepValue = 0.5

    def schedule(self, shape: ModelShape) -> Schedule:
        """All, then ``keep`` from ``layer`` on."""
        return Schedule.of({0: "all"} | {self.layer: self.keep}, shape.num_layers)

    def score(self, signals: Signals) -> torch.Tensor:
        """1 for evenly spaced tokens, 0 for the rest."""
        return uniform_score(signals)
