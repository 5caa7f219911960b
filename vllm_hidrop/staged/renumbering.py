"""The staged loop with ids that change at cuts: compacted, a rejected ablation of HiDrop, and renumbered.

Knows cuts and rotary embeddings; the loop itself is in ``forward``.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from vllm_hidrop.staged.image_runs import ImageRun
from vllm_hidrop.staged.loop import AttentionInputs, Entry, Gathered, StagedForward
from vllm_hidrop.staged.rows import Rows


class Unrotated(Gathered):
    """While entered, remembers the Q and K that a rotary embedding is first given; its kernel rotates in place.

    The scores of a cut are computed under the old ids. A cut layer that scores under its own Q and K then rotates the
    Q and K of the rows it kept once more, from before RoPE, by their new ids: what is stored and attended to is what a
    layer given only these rows would compute.
    """

    def __enter__(self) -> Self:
        self.handle = self.rotary.register_forward_pre_hook(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _remember(self, _: torch.nn.Module, inputs: AttentionInputs) -> None:
        self.handle.remove()
        _positions, query, key = inputs
        self.query, self.key = query.clone(), key.clone()

    def take(
        self, query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query [T', H * D] and key [T', G * D] of the rows at ``index``, rotated by their new ids."""
        query, key = self.rotary(ids, self.query[index], self.key[index])
        return query, key


class CompactedForward(StagedForward):
    """A staged forward whose survivors are renumbered after every scored cut.

    **Source** arXiv 2602.23699 section 4.3.

    **Differs** several images: each is numbered on from the row before it, as in training.
    """

    gathering = Unrotated

    def _number(self, rows: Rows, entry: Entry) -> None:
        rows.ids = compacted_ids(rows.ids, entry.runs)


class RenumberedForward(StagedForward):
    """A staged forward whose stages number all their rows anew; see ``PositionScheme.RENUMBERED``.

    **Source** the released PyramidDrop (``pdrop_rank_drop``) and MustDrop (``LlamaDynamicvitModel``).

    **Differs** stages that hold no vision number their text anew too, where the released programs have none.
    """

    gathering = Unrotated

    def _number(self, rows: Rows, entry: Entry) -> None:
        step, stage = entry.step, entry.stage
        if step.stages[stage] is not (step.stages[stage - 1] if stage else step.full):
            rows.ids = torch.from_numpy(step.renumbered_ids(stage)).to(rows.ids.device, non_blocking=True)


def compacted_ids(before: torch.Tensor, runs: list[ImageRun]) -> torch.Tensor:
    """Ids after a cut, int64 [T']: the survivors of every cut image are numbered on from the row before them.

    Args:
        before: int64 [T'], what the rows that are left had for ids.
        runs: the cut images, in the rows before the cut.
    """
    ids = before.clone()
    num_gone = 0
    for run in runs:
        first = run.first_row - num_gone
        num_gone += run.num_rows - run.keep
        has_neighbour = run.first_row > run.prompt_first_row
        start = before[first - 1] + 1 if has_neighbour else run.num_cached
        ids[first : first + run.keep] = start + torch.arange(run.keep, device=ids.device)
    return ids


def turned(rotary: Any, distance: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives rotated keys [n, G, D] ids that are higher by ``distance``: rotations add up."""
    table = rotary.cos_sin_cache
    cos, sin = (table[distance : distance + 1].float() / table[0, 0]).chunk(2, dim=-1)  # YaRN's table is scaled

    def turn(keys: torch.Tensor) -> torch.Tensor:
        return ApplyRotaryEmb.forward_static(keys.float(), cos, sin, rotary.is_neox_style).to(keys.dtype)

    return turn
