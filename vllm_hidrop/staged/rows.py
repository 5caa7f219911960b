"""The rows that a staged step runs, from stage to stage; carried hidden states that enter them, or are kept of them."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.staged.levels import Levels, still_to_add
from vllm_hidrop.staged.step import StagedStep


@dataclass
class Rows:
    """The rows that the current layer runs.

    Attributes:
        hidden: [T, C], one of vLLM's residual pair.
        residual: [T, C], the other; None before the first layer.
        full: int64 [T], the rows' indices among the step's full rows and, after them, the carried rows.
        ids: int64 [T], RoPE ids, or [3, T] of a model with M-RoPE.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None
    full: torch.Tensor
    ids: torch.Tensor

    def gather(self, index: torch.Tensor) -> None:
        """Keep the rows at ``index``, int64 [T']."""
        self.hidden = self.hidden[index]
        self.residual = None if self.residual is None else self.residual[index]
        self.full, self.ids = self.full[index], self.ids[..., index]

    def extend(self, hidden: torch.Tensor, full: torch.Tensor, ids: torch.Tensor) -> None:
        """Append rows with residual 0: hidden [N, C], full int64 [N] and their ids."""
        assert self.residual is not None, "a layer has run before any row comes in"
        self.hidden = torch.cat((self.hidden, hidden))
        self.residual = torch.cat((self.residual, torch.zeros_like(hidden)))
        self.full, self.ids = torch.cat((self.full, full)), torch.cat((self.ids, ids), dim=-1)


def carry_in(rows: Rows, step: StagedStep, stage: int, positions: torch.Tensor) -> None:
    """Put carried states before the rows of their prompts, for the prompts whose first cut is ``stage``."""
    carrying = step.carrying(stage)
    if not carrying:
        return
    pieces, cursor, end = [], 0, len(rows.full)
    for prefill in carrying:
        first, num_rows = int(step.stages[stage - 1].row_starts[prefill.index]), len(prefill.carried)
        pieces += [np.arange(cursor, first), np.arange(end, end + num_rows)]
        cursor, end = first, end + num_rows
    pieces.append(np.arange(cursor, len(rows.full)))
    indices = np.concatenate([np.arange(len(p.carried)) + step.first_carried[p.index] for p in carrying])
    full = async_tensor_h2d(indices, device=rows.full.device)
    hidden_size = rows.hidden.shape[1]
    hidden = torch.cat([prefill.carried[:, :hidden_size] for prefill in carrying])
    rows.extend(hidden, full, positions[..., full])
    rows.gather(async_tensor_h2d(np.concatenate(pieces), device=rows.full.device))


def keep_states(rows: Rows, step: StagedStep, stage: int, first_layer: int, levels: Levels) -> dict[str, torch.Tensor]:
    """Copy the hidden states [n, C * (1 + k)] that prompts whose first cut is ``stage`` keep, by request id.

    The stage starts at ``first_layer``; k ``levels`` are still to be added from there on, and are copied behind them.

    They reach from the last block boundary before the first image to the end of the last image. The residual is added
    to these rows and set to 0, in this step too: a later prompt that carries the copies in runs the very same numbers.
    """
    keeping = [p for p in step.prefills if p.keeps_state and p.plan.first_cut == stage]
    if not keeping:
        return {}
    assert rows.residual is not None, "no layer runs before the first one"
    rows.hidden, rows.residual = rows.hidden.clone(), rows.residual.clone()
    starts = step.entering(stage).row_starts
    states = {}
    for prefill in keeping:
        plan, first = prefill.plan, int(starts[prefill.index])
        if prefill.carried is None:
            first += plan.carried_from - prefill.num_computed
        kept = slice(first, first + plan.num_carried(plan.spans[-1].end))
        rows.hidden[kept] += rows.residual[kept]
        rows.residual[kept] = 0
        later = still_to_add(levels, first_layer, rows.full[kept])
        states[prefill.request_id] = torch.cat((rows.hidden[kept], *later), dim=1)
    return states


def scatter(hidden: torch.Tensor, full: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Put rows [T, C] back in their places ``full``, int64 [T], among ``num_rows`` rows; the other rows are zero."""
    if hidden.shape[0] == num_rows:
        return hidden
    return hidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, full, hidden)
