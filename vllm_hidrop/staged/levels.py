"""Levels (deepstack): features of later tower layers that a model adds to the vision rows behind its first layers."""

from collections.abc import Sequence

import torch

from vllm_hidrop.staged.step import StagedStep

Levels = Sequence[torch.Tensor]
"""By decoder layer, what is added behind it to the step's full rows and, after them, the carried rows, [T, C] each."""


def with_carried(levels: Levels, step: StagedStep) -> Levels:
    """The levels of the full rows [T, C] with those of the carried rows, which come with the carried states."""
    carried = [prefill.carried for prefill in step.prefills if prefill.carried is not None]
    if not carried or not levels:
        return levels
    return [
        torch.cat((level, *(_of_carried(state, index, levels) for state in carried)))
        for index, level in enumerate(levels)
    ]


def _of_carried(state: torch.Tensor, index: int, levels: Levels) -> torch.Tensor:
    """Level ``index`` of the rows of a carried state [n, C * (1 + k)], which holds the last k levels; else zeros."""
    hidden_size = levels[0].shape[1]
    blocks = state.split(hidden_size, dim=1)
    block = index - len(levels) + len(blocks)
    return blocks[block] if block >= 1 else torch.zeros_like(blocks[0])


def embeds_before(embeds: torch.Tensor, levels: Levels, first_layer: int) -> torch.Tensor:
    """Rows as they are injected before ``first_layer`` [T, C]: the layers are skipped, what is added behind is not."""
    for level in levels[:first_layer]:
        embeds = embeds + level[: len(embeds)]
    return embeds


def still_to_add(levels: Levels, first_layer: int, rows: torch.Tensor) -> list[torch.Tensor]:
    """The levels that are added behind ``first_layer`` and later layers, of these rows, int64 [n]: [n, C] each."""
    return [level[rows] for level in levels[first_layer:]]
