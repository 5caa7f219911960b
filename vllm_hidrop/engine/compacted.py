"""The staged loop with compacted positions, a rejected ablation of HiDrop (section 4.3, table 5).

Knows cuts and rotary embeddings; the loop itself is in ``forward``.
"""

from typing import Any, Self

import torch

from vllm_hidrop.engine.batch import StagedStep
from vllm_hidrop.engine.forward import AttentionInputs, Enter, Outcome, Rows, StagedForward
from vllm_hidrop.engine.layout import ImageRun
from vllm_hidrop.engine.watch import Scores, Watch, attention_to


class CompactedForward(StagedForward):
    """A staged forward whose survivors are renumbered after every scored cut.

    The scores of a cut are computed under the old ids. A cut layer that scores under its own Q and K then rotates the
    Q and K of the rows it kept once more, from before RoPE, by their new ids: what is stored and attended to is what a
    layer given only these rows would compute.

    **Source** arXiv 2602.23699 section 4.3; PyramidDrop numbers its tokens so.

    **Differs** several images: each is numbered on from the row before it, as in training.
    """

    def __call__(self, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor, enter: Enter) -> Outcome:
        """Run all layers; the ids in ``positions`` are those before the first cut."""
        return super().__call__(step, embeds, positions.clone(), enter)

    def _shorten(self, rows: Rows, runs: list[ImageRun], kept: torch.Tensor, positions: torch.Tensor) -> None:
        super()._shorten(rows, runs, kept, positions)
        renumber(positions, rows.full, runs)

    def _run_cut_layer(
        self, rows: Rows, runs: list[ImageRun], positions: torch.Tensor, scores: Scores, watch: Watch
    ) -> None:
        index = watch.layers[0]
        inside = [run for run in runs if run.cuts_inside]
        layer: Any = self.layers[index]

        def select(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionInputs:
            kept = self._cut(rows, runs, positions, scores | attention_to(inside, attention, query, key), watch)
            shortened = *unrotated.rotate(positions[rows.full], kept), value[kept]
            if watch.looks_at(index):
                watch.observe(attention, *shortened)
            return shortened

        with _Unrotated(layer.self_attn.rotary_emb) as unrotated:
            self._run_layer(index, rows, positions[rows.full], select, watch.edits(index))


def renumber(positions: torch.Tensor, full: torch.Tensor, runs: list[ImageRun]) -> None:
    """Number the survivors of every image that was cut on from the row before them.

    Args:
        positions: int64 [T_full], ids of the step's full rows; changed in place. Those of rows that are gone keep
            what they had: they never come back.
        full: int64 [T], the rows after the cut, among the full rows.
        runs: the cut images, in the rows before the cut.
    """
    before = positions.clone()
    num_gone = 0
    for run in runs:
        first = run.first_row - num_gone
        num_gone += run.num_rows - run.keep
        has_neighbour = run.first_row > run.prompt_first_row
        start = before[full[first - 1]] + 1 if has_neighbour else run.num_cached
        positions[full[first : first + run.keep]] = start + torch.arange(run.keep, device=positions.device)


class _Unrotated:
    """While entered, remembers the Q and K that a rotary embedding is first given; its kernel rotates in place."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        self.rotary = rotary

    def __enter__(self) -> Self:
        self.handle = self.rotary.register_forward_pre_hook(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _remember(self, _: torch.nn.Module, inputs: AttentionInputs) -> None:
        self.handle.remove()
        _positions, query, key = inputs
        self.query, self.key = query.clone(), key.clone()

    def rotate(self, ids: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query [T, H * D] and key [T, G * D] of the rows at ``index`` int64 [T], by their ids int64 [T]."""
        query, key = self.rotary(ids, self.query[index], self.key[index])
        return query, key
