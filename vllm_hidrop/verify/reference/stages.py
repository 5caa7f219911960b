"""Which vision tokens a stage of layers keeps: the rule that chooses, decided once for a prompt.

Axes: T rows of one pass, V vision tokens of one image, C hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from vllm_hidrop.verify.reference.attention import Kept, random_scores, top_indices, uniform_indices

Rule = Literal["attention_next", "attention_previous", "random", "uniform"]


@dataclass(frozen=True)
class OracleStage:
    """Layers that see the same vision tokens: from ``first_layer`` to the next stage's first layer.

    ``first_layer`` is zero-based and inclusive. ``keep`` counts the vision tokens of each image.
    """

    first_layer: int
    keep: tuple[int, ...]


def check_stages(stages: Sequence[OracleStage], image_sizes: list[int], num_layers: int) -> None:
    """Raise ValueError unless keep starts at any count, rises at most once, from 0 ever to all."""
    first_layers = [stage.first_layer for stage in stages]
    if not stages or first_layers[0] != 0 or first_layers[-1] >= num_layers:
        raise ValueError(f"stages must start at layer 0 and before {num_layers}: {first_layers}")
    if any(before >= after for before, after in pairwise(first_layers)):
        raise ValueError(f"first layers must rise, got {first_layers}")
    for stage in stages:
        if len(stage.keep) != len(image_sizes):
            raise ValueError(f"{len(image_sizes)} images, but keep is {stage.keep}")
    for image, size in enumerate(image_sizes):
        keeps = [stage.keep[image] for stage in stages]
        if min(keeps) < 0 or max(keeps) > size:
            raise ValueError(f"keep must be in [0, {size}], got {keeps} for image {image}")
        for index, (before, after) in enumerate(pairwise(keeps)):
            if after > before and (any(keeps[: index + 1]) or after != size):
                raise ValueError(f"keep may rise only from 0 ever to all {size}, got {keeps}")


class Selector:
    """Decides at each stage what stays visible: once, in the prompt pass; later passes replay it."""

    def __init__(self, rule: Rule, seed: int, image_rows: list[torch.Tensor]) -> None:
        self._rule = rule
        self._seed = seed
        self._image_rows = image_rows
        self._decided: dict[int, Kept] = {}
        self.selections: dict[int, Kept] = {}
        self.scores: dict[int, dict[int, torch.Tensor]] = {}

    def kept_at(self, stage: OracleStage, kept: Kept, attention: Callable[[int], torch.Tensor]) -> Kept:
        """What ``stage`` keeps, given what was ``kept`` until now.

        ``attention(layer)`` is what the last row pays to all rows [T] in ``layer``, the stage's first or the one
        before, on what was kept until now.
        """
        layer = stage.first_layer
        if layer not in self._decided:
            is_cut = [0 < keep < len(old) for keep, old in zip(stage.keep, kept, strict=True)]
            if any(is_cut) and self._rule != "uniform":
                self.scores[layer] = self._score(layer, kept, is_cut, attention)
            self._decided[layer] = [
                self._keep(layer, image, keep, kept[image]) for image, keep in enumerate(stage.keep)
            ]
            if any(is_cut):
                self.selections[layer] = self._decided[layer]
        return self._decided[layer]

    def _keep(self, layer: int, image: int, keep: int, survivors: list[int]) -> list[int]:
        if keep == 0:
            return []
        if not survivors:  # injection
            return list(range(len(self._image_rows[image])))
        if keep == len(survivors):
            return survivors
        if self._rule == "uniform":
            ranks = uniform_indices(len(survivors), keep)
        else:
            ranks = top_indices(self.scores[layer][image][survivors], keep)
        return [survivors[rank] for rank in ranks]

    def _score(
        self, layer: int, kept: Kept, is_cut: list[bool], attention: Callable[[int], torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Per image to cut its scores [V], on the CPU, NaN for tokens that are not survivors."""
        if self._rule != "random":
            scoring_layer = layer if self._rule == "attention_next" else layer - 1
            if scoring_layer < 0:
                raise ValueError("attention_previous cannot cut at layer 0")
            row_scores = attention(scoring_layer)
        scores = {}
        for image, rows in enumerate(self._image_rows):
            if not is_cut[image]:
                continue
            is_random = self._rule == "random"
            of_all = random_scores(self._seed, layer, len(rows)) if is_random else row_scores[rows].cpu()
            scores[image] = torch.full_like(of_all, torch.nan)
            scores[image][kept[image]] = of_all[kept[image]]
        return scores
