"""RoPE ids of the rows that a cut leaves, by position scheme; see ``plan.positions``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.staged.image_runs import ImageRun
from vllm_hidrop.staged.step import StagedStep

Pair = tuple[torch.Tensor, torch.Tensor]


class Rotated:
    """How a layer that is cut takes the Q and K of the rows that stay: as RoPE made them."""

    def take(self, query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> Pair:
        """Q [T', H * D] and K [T', G * D] of the rows at ``index``, int64 [T'], whose ids are ``ids`` from here on."""
        return query[index], key[index]


class RotatedAgain(Rotated):
    """Copies Q and K before RoPE, whose kernel rotates in place, and rotates the rows that stay by their new ids.

    The scores of a cut are computed under the old ids; what is stored and attended to is what a layer given only the
    rows that stay would compute.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.handle = rotary.register_forward_pre_hook(self._remember)

    def _remember(self, _: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self.handle.remove()
        _positions, query, key = inputs
        self.query, self.key = query.clone(), key.clone()

    def take(self, query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> Pair:
        """Q and K of the rows at ``index``, rotated by the new ids."""
        query, key = self.rotary(ids, self.query[index], self.key[index])
        return query, key


class PersistentIds:
    """Rows keep the ids they come with: those of the full prompt, or grouped ones."""

    @contextmanager
    def rotating(self, rotary: nn.Module) -> Iterator[Rotated]:
        """Wrap a layer that is cut, whose rotary embedding this is."""
        yield Rotated()

    def after_cut(self, ids: torch.Tensor, step: StagedStep, stage: int, runs: Sequence[ImageRun]) -> torch.Tensor:
        """New ids of a stage's rows, int64 [T'], from their old ``ids``; ``runs`` were cut on entry to the stage."""
        return ids


class _RenumberingIds(PersistentIds):
    @contextmanager
    def rotating(self, rotary: nn.Module) -> Iterator[Rotated]:
        """Wrap a layer that is cut, whose Q and K are needed from before RoPE."""
        rotated = RotatedAgain(rotary)
        try:
            yield rotated
        finally:
            rotated.handle.remove()


class CompactedIds(_RenumberingIds):
    """The survivors of every cut image are numbered on from the row before them.

    **Source** arXiv 2602.23699 section 4.3.

    **Differs** several images: each is numbered on from the row before it, as in training.
    """

    def after_cut(self, ids: torch.Tensor, step: StagedStep, stage: int, runs: Sequence[ImageRun]) -> torch.Tensor:
        """New ids of the survivors of every image in ``runs``; the other rows keep theirs."""
        if not runs:
            return ids
        places, befores, offsets, num_gone = [], [], [], 0
        for run in runs:
            first = run.first_row - num_gone
            num_gone += run.num_rows - run.keep
            has_row_before = run.first_row > run.prompt.first_row
            places.append(np.arange(first, first + run.keep))
            # Without a row before it, the image follows the cached tokens; its first row's own id is not used.
            befores.append(np.full(run.keep, first - 1 if has_row_before else -1))
            offsets.append(np.arange(run.keep) + (1 if has_row_before else run.prompt.num_cached))
        host = np.stack([np.concatenate(each) for each in (places, befores, offsets)])
        at, before, offset = async_tensor_h2d(host, device=ids.device)
        return ids.index_copy(0, at, torch.where(before < 0, offset, ids[before] + offset))


class RenumberedIds(_RenumberingIds):
    """Every stage numbers all its rows anew; see ``PositionScheme.RENUMBERED``.

    **Source** the released PyramidDrop (``pdrop_rank_drop``) and MustDrop (``LlamaDynamicvitModel``).

    **Differs** stages without vision tokens, which the released programs do not have, number their text anew too.
    """

    def after_cut(self, ids: torch.Tensor, step: StagedStep, stage: int, runs: Sequence[ImageRun]) -> torch.Tensor:
        """New ids of all rows, where the stage runs other rows than the stage before."""
        if step.stages[stage] is (step.stages[stage - 1] if stage else step.full):
            return ids
        return async_tensor_h2d(step.renumbered_ids(stage), device=ids.device)


def ids_of(positions: PositionScheme) -> PersistentIds:
    """The rule of a position scheme."""
    schemes = {PositionScheme.COMPACTED: CompactedIds, PositionScheme.RENUMBERED: RenumberedIds}
    return schemes.get(positions, PersistentIds)()


def turned(rotary: Any, distance: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that raises the RoPE ids of rotated keys [n, G, D] by ``distance``: rotations add up."""
    table = rotary.cos_sin_cache
    cos, sin = (table[distance : distance + 1].float() / table[0, 0]).chunk(2, dim=-1)  # YaRN's table is scaled

    def turn(keys: torch.Tensor) -> torch.Tensor:
        return ApplyRotaryEmb.forward_static(keys.float(), cos, sin, rotary.is_neox_style).to(keys.dtype)

    return turn
