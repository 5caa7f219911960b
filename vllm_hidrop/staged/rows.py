"""The rows that a staged step runs, from stage to stage, and the states that come in or are kept on the way."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_hidrop.staged.step import StagedStep


@dataclass
class Rows:
    """The current rows: vLLM's residual pair, which of the step's full rows they are, and their RoPE ids."""

    hidden: torch.Tensor
    residual: torch.Tensor | None
    full: torch.Tensor
    """int64 [T], indices into the step's full rows and, after them, the carried ones."""
    ids: torch.Tensor
    """int64 [T]."""

    def gather(self, index: torch.Tensor) -> None:
        """Keep the rows at ``index``, int64 [T']."""
        self.hidden = self.hidden[index]
        self.residual = None if self.residual is None else self.residual[index]
        self.full, self.ids = self.full[index], self.ids[index]

    def extend(self, hidden: torch.Tensor, full: torch.Tensor, ids: torch.Tensor) -> None:
        """Append rows with residual 0: hidden [N, C], full and ids int64 [N]."""
        assert self.residual is not None, "a layer has run before any row comes in"
        self.hidden = torch.cat((self.hidden, hidden))
        self.residual = torch.cat((self.residual, torch.zeros_like(hidden)))
        self.full, self.ids = torch.cat((self.full, full)), torch.cat((self.ids, ids))


def carry_in(rows: Rows, step: StagedStep, stage: int, positions: torch.Tensor) -> None:
    """Put the carried states of the prompts whose first cut is ``stage`` before their rows."""
    carrying = step.carrying(stage)
    if not carrying:
        return
    pieces, cursor, end = [], 0, len(rows.full)
    for prefill in carrying:
        first, num_rows = int(step.stages[stage - 1].row_starts[prefill.index]), len(prefill.carried)
        pieces += [np.arange(cursor, first), np.arange(end, end + num_rows)]
        cursor, end = first, end + num_rows
    pieces.append(np.arange(cursor, len(rows.full)))
    numbers = np.concatenate([np.arange(len(p.carried)) + step.first_carried[p.index] for p in carrying])
    full = torch.from_numpy(numbers).to(rows.full.device)
    rows.extend(torch.cat([prefill.carried for prefill in carrying]), full, positions[full])
    rows.gather(torch.from_numpy(np.concatenate(pieces)).to(rows.full.device))


def keep_states(rows: Rows, step: StagedStep, stage: int) -> dict[str, torch.Tensor]:
    """The states of prompts whose first cut is ``stage`` and which are to be kept.

    They are those from the last block boundary before the first image to the end of the last. These rows go on as
    those of a later prompt will: with the sum as hidden state, and residual 0.
    """
    keeping = [p for p in step.prefills if p.keeps_state and p.plan.first_cut == stage]
    if not keeping:
        return {}
    assert rows.residual is not None, "no layer runs before the first one"
    rows.hidden, rows.residual = rows.hidden.clone(), rows.residual.clone()
    starts = step.entering(stage).row_starts
    found = {}
    for prefill in keeping:
        plan, first = prefill.plan, int(starts[prefill.index])
        if prefill.carried is None:
            first += plan.carried_from - prefill.num_computed
        here = slice(first, first + plan.num_carried(plan.spans[-1].end))
        rows.hidden[here] += rows.residual[here]
        rows.residual[here] = 0
        found[prefill.request_id] = rows.hidden[here].clone()
    return found


def scatter(hidden: torch.Tensor, full: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Put compact rows back in their places among the full rows."""
    if hidden.shape[0] == num_rows:
        return hidden
    return hidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, full, hidden)
