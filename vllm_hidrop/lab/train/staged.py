"""The staged forward in training: every stage on the rows that are left, with gradients.

The arithmetic is the served one (``staged/loop.py``), on samples packed one behind the other. Axes: N rows of the full
prompts, N' rows left, B samples, C hidden size, H query heads, G key/value heads, D head size.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor, nn

from vllm_hidrop.lab.train.decoder import Decoder, query_attention, rotate
from vllm_hidrop.lab.train.dtopk import SMOOTH, gates
from vllm_hidrop.lab.train.ratio import Ratio
from vllm_hidrop.lab.train.rows import (
    Rows,
    State,
    all_rows,
    compacted_positions,
    grouped_positions,
    places_in_samples,
)
from vllm_hidrop.methods import Adaptive, Method, ModelShape
from vllm_hidrop.methods.scoring import RowAttention, Scorer, Signals, select_top
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import ALL, Keep, Schedule
from vllm_hidrop.plan.signal import Signal


class Selection(StrEnum):
    """What the backward pass knows of a cut."""

    DIFFERENTIABLE = "differentiable"
    """Straight through a soft mask that all survivors learn from (``dtopk.SMOOTH``, log-scores).

    The mask stands for how present a token is: it multiplies the token's terms in the sums of every later softmax.
    """
    AS_WRITTEN = "as_written"
    """Straight through the paper's soft mask, which multiplies the token's state and its values."""
    AS_RELEASED = "as_released"
    """Nothing: the choice is a constant, as in the released code."""


@dataclass(frozen=True)
class StagedOutput:
    """Final-norm states [N', C] of the rows the last stage holds, and their places in the input, int64 [N'].

    ``row_starts`` int32 [B + 1] tells the samples apart.
    """

    hidden: Tensor
    places: Tensor
    row_starts: Tensor


SIGNALS = (Signal.NONE, Signal.NEXT_ATTENTION, Signal.PREVIOUS_ATTENTION)
"""The signals that training computes."""


def check_trainable(method: Method) -> None:
    """ValueError for a method that decides its counts while a prompt runs or scores by a signal not in ``SIGNALS``."""
    if isinstance(method, Adaptive):
        raise ValueError(
            f"{method.name} decides while a prompt runs how many tokens stay, and is made for models trained dense: "
            "serve it, do not train with it"
        )
    if method.signal not in SIGNALS:
        raise ValueError(
            f"{method.name} scores by {method.signal}, which training does not compute: {', '.join(SIGNALS)}"
        )


class StagedTraining(nn.Module):
    """Runs a language model under a schedule so that a loss can be taken behind it.

    Text rows run in every layer. Vision rows enter raw at the injection layer, are chosen at every cut by the method's
    own score, per image, and are gone after the exit. At a cut the survivors get the gate of ``dtopk.gates``, which is
    1 and has a gradient; :class:`Selection` says what it multiplies.

    ``scorer`` reads ``signal`` and scores one image's survivors; ``ratio`` learns the keeps, None leaves the
    schedule's.

    **Source** arXiv 2602.23699 sections 3.1 to 3.3.

    **Differs** the score is the mean over the last instruction tokens of all rounds, as released; a sample without one
    is not pruned. Serving scores with the last prompt row only, which is the same for one round.
    """

    def __init__(
        self,
        decoder: Decoder,
        schedule: Schedule,
        signal: Signal,
        scorer: Scorer,
        selection: str = Selection.DIFFERENTIABLE,
        position_scheme: str = PositionScheme.PERSISTENT,
        ratio: Ratio | None = None,
    ) -> None:
        super().__init__()
        self.llm: nn.Module = decoder.llm  # for its parameters
        self.decoder = decoder
        self.schedule = schedule
        self.signal = signal
        self.scorer = scorer
        self.selection = Selection(selection)
        self.position_scheme = PositionScheme(position_scheme)
        self.ratio = ratio

    @classmethod
    def from_method(
        cls,
        decoder: Decoder,
        method: Method,
        shape: ModelShape,
        selection: str = Selection.DIFFERENTIABLE,
        position_scheme: str = PositionScheme.PERSISTENT,
        ratio: Ratio | None = None,
    ) -> Self:
        """The forward of a method on a model of this shape; ValueError when they do not fit."""
        schedule = method.schedule(shape)
        return cls(decoder, schedule, method.signal, method.score, selection, position_scheme, ratio)

    def forward(self, embeds: Tensor, rows: Rows) -> StagedOutput:
        """Run all layers on embeddings [N, C] with projector outputs at the vision rows."""
        if self.ratio is not None:
            self.schedule = self.ratio.schedule()  # same stages, this step's keeps
        if self.position_scheme is PositionScheme.GROUPED:
            rows = replace(rows, positions=grouped_positions(rows))
        state = self.run_stages(0, all_rows(embeds, rows), embeds, rows)
        return StagedOutput(self.decoder.norm(state.hidden), state.places, state.rows.row_starts)

    def run_stages(self, first_stage: int, state: State, embeds: Tensor, rows: Rows) -> State:
        """Run the stages from ``first_stage`` on; ``embeds`` and ``rows`` are those of the full prompts."""
        attention: Tensor | None = None
        for index in range(first_stage, len(self.schedule.stages)):
            stage = self.schedule.stages[index]
            first, end = stage.first_layer, self.schedule.end_layers[index]
            if self._keep_before(index).is_none and not stage.keep.is_none:
                text = state.hidden
                state = all_rows(embeds.to(text.dtype).index_copy(0, state.places, text), rows)
            if stage.keep.is_none:
                text_only = state.take((~state.rows.is_vision).nonzero().flatten())
                state = self._renumbered(replace(text_only, presence=None))
            elif self.selects(index) and self.signal is Signal.NEXT_ATTENTION:
                projected = self.decoder.project(first, state.hidden)
                state = self.cut_projected(first, state, projected, stage.keep, rows)
                first += 1
            elif self.selects(index):
                kept, gate = self._choose(first, state, stage.keep, rows, attention)
                state = self._renumbered(self._gated(state, gate).take(kept))
            scores = self.signal is Signal.PREVIOUS_ATTENTION and self.selects(index + 1)
            state, attention = self.run_layers(first, end, state, scores)
        return state

    def selects(self, stage: int) -> bool:
        """Whether a score decides who enters ``stage``."""
        if stage >= len(self.schedule.stages):
            return False
        keep, before = self.schedule.stages[stage].keep, self._keep_before(stage)
        return not (keep.is_all or keep.is_none or before.is_none)

    def _keep_before(self, stage: int) -> Keep:
        """The keep of the stage before; before the first it is every token."""
        return self.schedule.stages[stage - 1].keep if stage else ALL

    def run_layers(self, first: int, end: int, state: State, scores: bool = False) -> tuple[State, Tensor | None]:
        """Layers ``first`` to ``end`` (exclusive) on the same rows; with ``scores`` also the last one's attention."""
        rotary = self.decoder.rotary(state.hidden, state.rows.positions)
        hidden, attention = state.hidden, None
        for index in range(first, end):
            hidden, query, key = self.decoder.run(index, hidden, rotary, state.rows.row_starts, state.presence)
            if scores and index == end - 1:
                attention = query_attention(query, key, state.rows)
        return replace(state, hidden=hidden), attention

    def cut_projected(
        self, index: int, state: State, projected: tuple[Tensor, Tensor, Tensor], keep: Keep, full_rows: Rows
    ) -> State:
        """The first layer of a stage behind a cut: choose by its own Q and K of all rows, run it on the chosen rows.

        ``projected`` are query [N', H, D], key and value [N', G, D] before RoPE.
        """
        query, key, value = projected
        rotated = rotate(query, key, self.decoder.rotary(state.hidden, state.rows.positions))
        kept, gate = self._choose(index, state, keep, full_rows, query_attention(*rotated, state.rows))
        gated = self._gated(state, gate)
        if self.selection is Selection.AS_WRITTEN:
            value = value * gate[:, None, None].to(value.dtype)
        short = self._renumbered(gated.take(kept))
        query, key = rotate(query[kept], key[kept], self.decoder.rotary(short.hidden, short.rows.positions))
        attended = self.decoder.attend(
            index, short.hidden, (query, key, value[kept]), short.rows.row_starts, short.presence
        )
        return replace(short, hidden=attended)

    def _gated(self, state: State, gate: Tensor) -> State:
        """Put the cut's gradient on the residual as written, else on how present a row is to the others."""
        if self.selection is Selection.AS_WRITTEN:
            return replace(state, hidden=state.hidden * gate[:, None].to(state.hidden.dtype))
        if not gate.requires_grad:
            return state
        return replace(state, presence=gate if state.presence is None else gate * state.presence)

    def _choose(
        self, layer: int, state: State, keep: Keep, full_rows: Rows, attention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which rows stay, int64 ascending, and the gate of every row, [N']."""
        stays = ~state.rows.is_vision
        gate = torch.ones(len(stays), device=stays.device)
        whole = {(sample, image): here for sample, image, here in full_rows.image_rows()}
        has_query = [bool(asked.any()) for asked in state.rows.is_query.split(state.rows.lengths)]
        for sample, image, here in state.rows.image_rows():
            size = len(whole[sample, image])
            num_kept = keep.resolve(size)
            if num_kept >= len(here) or not has_query[sample]:
                stays[here] = True
                continue
            seen = None if attention is None else RowAttention(attention[here])
            scores = self.scorer(Signals(layer, num_kept, size, state.places[here] - whole[sample, image][0], seen))
            stays[here[select_top(scores.detach(), num_kept)]] = True
            if seen is not None and torch.is_grad_enabled() and self.selection is not Selection.AS_RELEASED:
                gate = gate.index_put((here,), self._gates(layer, scores, num_kept))
        return stays.nonzero().flatten(), gate

    def _gates(self, layer: int, scores: Tensor, num_kept: int) -> Tensor:
        share = None if self.ratio is None else self.ratio.dropped_share(layer, len(scores))
        if self.selection is Selection.AS_WRITTEN:
            return gates(scores, num_kept, share)
        return gates(scores.clamp_min(torch.finfo(scores.dtype).tiny).log(), num_kept, share, SMOOTH)

    def _renumbered(self, state: State) -> State:
        if self.position_scheme is PositionScheme.COMPACTED:
            return replace(state, rows=replace(state.rows, positions=compacted_positions(state.rows)))
        if self.position_scheme is PositionScheme.RENUMBERED:
            positions = places_in_samples(state.rows.row_starts).to(state.rows.positions)
            return replace(state, rows=replace(state.rows, positions=positions))
        return state
