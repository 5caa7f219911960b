"""From curves to a schedule, as arithmetic on plain numbers.

Layers are the paper's one-based numbers throughout, as in the options of `vllm_hidrop.methods.hidrop`: ``inject``
is the first layer with vision, a filter r stands after layer r, ``exit`` is the first layer without vision (one more
than the number of layers: no early exit). A curve is a list whose entry 0 belongs to layer 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vllm_hidrop.config import make_method
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.plan.schedule import Schedule

PAPER_TAIL = (10, 5, 1)
"""Tokens kept after the second filter and later ones, in every released schedule."""
PAPER_TOKENS_PER_IMAGE = 576
FUSION_FALL = 0.1
"""Text counts as fused from the layer where cross-image similarity has made this share of its whole fall."""
MIN_FALL = 1e-4
"""Below this a cross-image fall counts as none: the image does not reach the text."""


@dataclass(frozen=True)
class Boundaries:
    """Where vision enters and leaves; ``notes`` say where the curves gave no clear sign."""

    inject_layer: int
    exit_layer: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """A schedule in the words of `vllm_hidrop.methods.hidrop.HiDrop`; ``shape`` is layers and tokens per image.

    Where images have various numbers of tokens (``is_dynamic``) the keeps are written as shares of ``shape``'s.
    """

    boundaries: Boundaries
    filter_layers: tuple[int, ...]
    keeps: tuple[int, ...]
    shape: tuple[int, int]
    is_dynamic: bool = False

    def schedule(self) -> Schedule:
        """The schedule that the options give."""
        return make_method("hidrop", None, self.options()).schedule(ModelShape(*self.shape, self.is_dynamic))

    def options(self) -> dict[str, Any]:
        """The method's options as plain JSON data."""
        exit_layer = self.boundaries.exit_layer
        return {
            "inject_layer": self.boundaries.inject_layer,
            "filter_layers": list(self.filter_layers),
            "keeps": [f"{keep}/{self.shape[1]}" if self.is_dynamic else keep for keep in self.keeps],
            "exit_layer": None if exit_layer > self.shape[0] else exit_layer,
            "shape": list(self.shape),
        }


def local_maxima(curve: Sequence[float]) -> list[int]:
    """One-based layers whose value is above the one before and not below the one after; an end has one neighbour."""
    padded = (-math.inf, *curve, -math.inf)
    return [i for i in range(1, len(padded) - 1) if padded[i - 1] < padded[i] >= padded[i + 1]]


def fusion_layer(cross: Sequence[float]) -> int | None:
    """First layer whose text depends on the image, None when there is none.

    It is where the cross-image similarity has fallen below 1 by `FUSION_FALL` of its largest fall.
    """
    falls = [1 - value for value in cross]
    if max(falls) < MIN_FALL:
        return None
    return next(layer for layer, fall in enumerate(falls, 1) if fall >= FUSION_FALL * max(falls))


def injection_layer(vision_intra: Sequence[float], cross: Sequence[float]) -> tuple[int, str | None]:
    """The injection layer, and a note where it is not the paper's local minimum.

    It is the last local minimum of the vision curve (ends excluded) up to the layer where text fuses: a later one would
    take the image from layers that read it. Without one it is the layer where text fuses; without that, 1.
    """
    fused = fusion_layer(cross)
    if fused is None:
        return 1, "no layer's text depends on the image: inject at layer 1"
    inner = [-value for value in vision_intra]
    minima = [layer for layer in local_maxima(inner) if 1 < layer < len(inner)]
    safe = [layer for layer in minima if layer <= fused]
    if safe:
        return safe[-1], None
    return fused, f"no local minimum of vision similarity up to layer {fused}, where text fuses: inject there"


def exit_layer(agreement: Sequence[float], tolerance: float) -> int:
    """Smallest exit such that it and every later one lose at most ``tolerance`` of agreement.

    ``agreement[x - 1]`` belongs to exit x; no early exit, ``len(agreement) + 1``, agrees by definition.
    """
    chosen = len(agreement) + 1
    while chosen > 1 and agreement[chosen - 2] >= 1 - tolerance - 1e-9:
        chosen -= 1
    return chosen


def boundaries(
    vision_intra: Sequence[float], cross: Sequence[float], agreement: Sequence[float], tolerance: float
) -> Boundaries:
    """Injection and exit with room for one filter between them; moving either only adds layers with vision."""
    num_layers = len(vision_intra)
    inject, note = injection_layer(vision_intra, cross)
    notes = [note] if note else []
    if inject > num_layers - 1:
        inject = num_layers - 1
        notes.append(f"injection moved up to layer {inject} to leave room for a filter")
    leave = exit_layer(agreement, tolerance)
    if leave > num_layers:
        notes.append("every early exit changes more answers than the tolerance allows: no early exit")
    if leave < inject + 2:
        notes.append(f"exit {leave} moved down to {inject + 2} to leave room for a filter")
        leave = inject + 2
    return Boundaries(inject, leave, tuple(notes))


def filter_layers(ilvas: Sequence[float], where: Boundaries, num_filters: int) -> tuple[int, ...]:
    """Filters before the layers whose attention lasts: local maxima of ILVAS between injection and exit.

    A filter after layer r scores with layer r + 1, so a peak at layer l means a filter after l - 1. Of more peaks than
    filters the highest stay; fewer are filled up by the layers of highest ILVAS. Layers without ILVAS are not chosen.
    """
    last = min(where.exit_layer - 1, len(ilvas))
    between = range(where.inject_layer + 1, last + 1)
    peaks = set(local_maxima(ilvas))
    ranked = sorted(between, key=lambda layer: (layer not in peaks, -ilvas[layer - 1], layer))
    return tuple(sorted(layer - 1 for layer in ranked[:num_filters]))


def stage_layers(where: Boundaries, filters: Sequence[int]) -> tuple[int, ...]:
    """Number of layers of every stage with vision: the whole image first, then one per filter."""
    return tuple(b - a for a, b in pairwise([where.inject_layer - 1, *filters, where.exit_layer - 1]))


def tail_keeps(num_filters: int, tokens_per_image: int) -> tuple[int, ...]:
    """Keeps after all filters but the first: the paper's 10, 5, 1 of 576 tokens, scaled to the image.

    For another number of filters they are linear between these three; rounded half up, at least 1.
    """
    last = len(PAPER_TAIL) - 1
    tail = np.interp(np.linspace(0, last, num_filters - 1), range(last + 1), PAPER_TAIL)
    return tuple(max(1, math.floor(keep * tokens_per_image / PAPER_TOKENS_PER_IMAGE + 0.5)) for keep in tail)


def keep_counts(where: Boundaries, filters: Sequence[int], shape: tuple[int, int], budget: float) -> tuple[int, ...]:
    """The concave pyramid: a fixed tail, and a first keep that makes the mean over all layers the budget.

    The first keep is rounded up, as in the released schedules: the mean exceeds the budget by less than one token in
    the layers of the first filter's stage. ``shape`` is layers and tokens per image. ValueError says what is possible.
    """
    num_layers, num_tokens = shape
    if not filters:
        raise ValueError(f"no layer to filter at between injection {where.inject_layer} and exit {where.exit_layer}")
    full, first, *rest = stage_layers(where, filters)
    tail = tail_keeps(len(filters), num_tokens)
    fixed = full * num_tokens + sum(k * n for k, n in zip(tail, rest, strict=True))
    least_keep = max(tail, default=1)
    least, most = (fixed + keep * first for keep in (least_keep, num_tokens))
    wanted = round(budget * num_layers, 6)  # a mean of whole tokens, times layers, is rarely whole in floats
    if wanted < least:
        raise ValueError(
            f"budget {budget:g} cannot be met: layers {where.inject_layer} to {filters[0]} hold all {num_tokens} "
            f"tokens and alone cost a mean of {full * num_tokens / num_layers:.1f} over {num_layers} layers; "
            f"the least this schedule reaches is {math.ceil(10 * least / num_layers) / 10:.1f}"
        )
    if wanted > most:
        raise ValueError(
            f"budget {budget:g} cannot be used up: the most this schedule reaches is "
            f"{math.floor(10 * most / num_layers) / 10:.1f} of {num_tokens} tokens"
        )
    return (max(least_keep, math.ceil((wanted - fixed) / first)), *tail)


def propose(
    curves: Mapping[str, Sequence[float]], shape: ModelShape, budget: float, tolerance: float, num_filters: int
) -> Proposal:
    """A whole schedule; ValueError where none of this form meets the budget.

    ``curves`` are ``vision_intra``, ``cross`` and ``agreement`` by layer, and ``ilvas`` of the window that decides. The
    counts are for ``shape``'s tokens per image; ``budget`` is vision tokens, the mean over all layers; ``tolerance`` is
    the share of agreement that an exit may lose; ``num_filters`` >= 1 is the most.
    """
    where = boundaries(curves["vision_intra"], curves["cross"], curves["agreement"], tolerance)
    filters = filter_layers(curves["ilvas"], where, num_filters)
    return Proposal(where, filters, keep_counts(where, filters, shape.size, budget), shape.size, shape.is_dynamic)
