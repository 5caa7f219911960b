"""A request's plan: its images, and how many of their tokens every stage of the schedule keeps, as host data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vllm_hidrop.plan.places import Span, StagePlaces
from vllm_hidrop.plan.schedule import Cached, Schedule

DENSE = ""
"""Name of the encoding (``Plan.encoding``) whose image features are stock vLLM's to the bit."""


@dataclass(frozen=True)
class Plan:
    """For one request, the number of vision tokens that every stage keeps (host ints), known before the request runs.

    Attributes:
        spans: the images' places in the prompt, ascending.
        kept: ``kept[s][i]`` tokens of image ``i`` in stage ``s``; upper bounds while ``decided`` is False.
        fallback: why a request that could have been pruned is not; None otherwise.
        adaptive: the method decides counts while the prompt runs, and may edit attention where no count shows it.
        decided: False until the worker of an adaptive prompt has reported its counts.
        has_run: the counts are what the caches hold after prefill; the invariants of a schedule do not bind them.
        prefix_tokens: length of the text before the first image that may run, or be cached, ahead of the rest of the
            prompt, as its rows are the same in every stage and whatever follows; 0 where they are not.
        carried_from: the last block boundary within the prefix.
        explains: the request's report lists the tokens that every stage kept.
        encoding: name of the way in which the vision tower makes the images' features, :data:`DENSE` for stock vLLM's.
        renumbered: RoPE ids depend on how many tokens a stage drops, and merged tokens come first in their image.
    """

    num_prompt_tokens: int
    spans: tuple[Span, ...]
    kept: tuple[tuple[int, ...], ...]
    fallback: str | None = None
    adaptive: bool = False
    decided: bool = True
    method: str = ""
    has_run: bool = False
    prefix_tokens: int = 0
    carried_from: int = 0
    explains: bool = False
    encoding: str = DENSE
    renumbered: bool = False

    def __post_init__(self) -> None:
        if self.has_run:
            return
        for image, span in enumerate(self.spans):
            column = [stage[image] for stage in self.kept]
            before = span.length
            for stage, now in enumerate(column):
                injects = not any(column[:stage]) and now == span.length
                if now > before and not injects:
                    raise ValueError(f"keep must not rise after injection, got {column} for an image")
                before = now

    @cached_property
    def num_vision_tokens(self) -> int:
        """Vision tokens of the full prompt."""
        return sum(span.length for span in self.spans)

    @cached_property
    def dropped(self) -> tuple[int, ...]:
        """Prompt tokens that each stage does not hold."""
        return tuple(self.num_vision_tokens - sum(stage) for stage in self.kept)

    @cached_property
    def is_pruned(self) -> bool:
        """Whether a stage drops tokens, or the method may decide that it does."""
        return self.adaptive or any(self.dropped)

    def bounded(self, stage: int, kept: Sequence[int]) -> "Plan":
        """The plan with at most ``kept[i]`` tokens of image ``i`` from ``stage`` on."""
        lower = tuple(tuple(map(min, counts, kept)) for counts in self.kept[stage:])
        return replace(self, kept=self.kept[:stage] + lower)

    def settled(self, kept: Sequence[Sequence[int]]) -> "Plan":
        """The plan with the counts that the worker decided; ValueError where one exceeds its bound."""
        for stage, (bounds, counts) in enumerate(zip(self.kept, kept, strict=True)):
            if any(count > bound for count, bound in zip(counts, bounds, strict=True)):
                raise ValueError(f"stage {stage} keeps {counts}, more than the bound {bounds}")
        return replace(self, kept=tuple(map(tuple, kept)), decided=True)

    def after_prefill(self, schedule: Schedule) -> "Plan":
        """The plan by which the caches are counted once the prompt has run: a stage may cache fewer tokens than ran."""
        if not self.adaptive:
            return self
        cut_caches = {Cached.FINAL: self.kept[-1], Cached.NONE: (0,) * len(self.spans)}
        kept = tuple(cut_caches.get(stage.cached, ran) for stage, ran in zip(schedule.stages, self.kept, strict=True))
        return replace(self, kept=kept, has_run=True)

    def stage_tokens(self, stage: int, num_tokens: int) -> int:
        """Tokens that ``stage`` holds of the request's first ``num_tokens``.

        A pruned prompt is prefilled in one step, so ``num_tokens`` is within the prefix or at least the prompt's
        length; or, where images are reused, the end of an image: then the stages from the first cut on hold nothing
        behind ``carried_from``.
        """
        if num_tokens >= self.num_prompt_tokens:
            return num_tokens - self.dropped[stage]
        if not self.is_pruned or num_tokens <= self.prefix_tokens:
            return num_tokens
        return self.carried_from if stage >= self.first_cut else self.places[stage].count(num_tokens)

    @cached_property
    def places(self) -> tuple[StagePlaces, ...]:
        """Per stage, where the prompt's tokens stand."""
        return tuple(StagePlaces(self.spans, kept) for kept in self.kept)

    def places_entering(self, stage: int) -> StagePlaces:
        """Where the prompt's tokens stand on entry to a stage: as in the stage before, or in the full prompt."""
        return self.places[stage - 1] if stage else StagePlaces(self.spans, tuple(span.length for span in self.spans))

    @cached_property
    def first_cut(self) -> int:
        """Index of the first stage that selects tokens of an image; the number of stages where none does.

        Before that stage, a token's K and V depend on nothing behind the token.
        """
        stages = ((span.length for span in self.spans), *self.kept)
        selects = (any(0 < n < m for n, m in zip(now, before, strict=True)) for before, now in pairwise(stages))
        return next((stage for stage, does_select in enumerate(selects) if does_select), len(self.kept))

    def num_carried(self, num_tokens: int) -> int:
        """Rows that enter the first cut for the tokens from ``carried_from`` to the end of an image."""
        return self.places_entering(self.first_cut).count(num_tokens) - self.carried_from

    def places_carried(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """Prompt places of these rows, int64 [n]."""
        entering = self.places_entering(self.first_cut)
        survivors = [np.arange(kept, dtype=np.int32) for kept in entering.kept]
        return entering.prompt_places(self.num_prompt_tokens, survivors)[self.carried_from : entering.count(num_tokens)]


ENDS_WITH_IMAGE = "the prompt ends with an image: no text row is left to score from"
FALLBACKS = {ENDS_WITH_IMAGE: "ends_with_image"}
"""Why a request that could have been pruned is not -> the metrics' label of that reason."""


def make_plan(
    schedule: Schedule, num_prompt_tokens: int, spans: Iterable[Span], keep_all: bool = False, adaptive: bool = False
) -> Plan:
    """Resolve a schedule for one prompt; ValueError where its keeps rise after injection for an image of this size.

    ``keep_all``: every stage keeps every token, as the dense model does (``off``). ``adaptive``: the method decides the
    counts while the prompt runs; the schedule's keeps are upper bounds.
    """
    ordered = tuple(sorted(spans, key=lambda span: span.offset))
    kept = tuple(tuple(stage.keep.resolve(span.length) for span in ordered) for stage in schedule.stages)
    whole = tuple(tuple(span.length for span in ordered) for _ in schedule.stages)
    acts = (kept != whole or adaptive) and bool(ordered) and not keep_all
    fallback = None
    if acts and ordered[-1].end == num_prompt_tokens:
        fallback = ENDS_WITH_IMAGE
    adapts = adaptive and acts and fallback is None
    return Plan(
        num_prompt_tokens, ordered, whole if keep_all or fallback else kept, fallback, adapts, decided=not adapts
    )
