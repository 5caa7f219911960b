"""PyramidDrop: halve the vision tokens at the end of every quarter of the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_hidrop.methods.base import SCALED, Method, ModelShape
from vllm_hidrop.methods.scored_layers import nearest_cuts
from vllm_hidrop.methods.scoring import Signals, attention_score
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import KeepValue, Schedule
from vllm_hidrop.plan.signal import Signal


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Several stages of equal length, each keeping a fixed fraction of the image's tokens.

    **Source** arXiv 2410.17247 section 3; released defaults: cuts 8, 16, 24 of 32 layers, keeps 0.5, 0.25, 0.125.

    **Differs** the released code, in training too, numbers rows anew after every cut, text and generated tokens
    included: ``positions`` "renumbered" does that, and checkpoints trained with PyramidDrop need it. By default
    positions here are the full prompt's, so the first cut keeps the same tokens and the later ones others. The row that
    scores is the last prompt row, which is the last instruction row at inference. Each image keeps its own share.

    **Options** ``cuts`` (depth of every cut as a fraction of the layers), ``keeps`` (fraction or count per image after
    each cut).
    """

    name = "pyramiddrop"
    paper = "arXiv 2410.17247"
    summary = "halves the tokens at every quarter of the depth"
    signal = Signal.NEXT_ATTENTION
    layer_options = tuned_options = ("cuts",)
    elsewhere = SCALED
    trained_positions = PositionScheme.RENUMBERED

    cuts: tuple[float, ...] = (0.25, 0.5, 0.75)
    keeps: tuple[KeepValue, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        if len(self.cuts) != len(self.keeps):
            raise ValueError(f"cuts and keeps must pair up, got {len(self.cuts)} and {len(self.keeps)}")

    def _first_layers(self, shape: ModelShape) -> list[int]:
        return [max(1, round(depth * shape.num_layers)) for depth in self.cuts]

    def moved(self, shape: ModelShape) -> Mapping[str, object]:
        """``cuts``, moved."""
        layers = self._first_layers(shape)
        moved = nearest_cuts(self.signal, layers, shape)
        return {} if moved == layers else {"cuts": tuple(layer / shape.num_layers for layer in moved)}

    def schedule(self, shape: ModelShape) -> Schedule:
        """All, then one stage per cut; cuts that fall on one layer merge, the smaller keep wins."""
        keeps: dict[int, KeepValue] = {0: "all"}
        keeps |= dict(zip(self._first_layers(shape), self.keeps, strict=True))
        return Schedule.of(keeps, shape.num_layers)

    def score(self, signals: Signals) -> torch.Tensor:
        """The last prompt row's attention under the first layer of the new stage."""
        return attention_score(signals)
