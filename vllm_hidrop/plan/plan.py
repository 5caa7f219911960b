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
"""The encoding of images whose features are stock vLLM's to the bit."""


@dataclass(frozen=True)
class Plan:
    """For one request, the vision tokens every stage holds (host ints), known before it runs.

    ``kept[s][i]`` is the number of tokens of image ``i`` in stage ``s``; where the method decides the number while
    the prompt runs (``decided`` False), it is an upper bound until the worker has told. ``fallback`` says why a request
    that could have been pruned is not, and is None otherwise. ``adaptive``: the method acts on this request even where
    the counts do not show it. ``method`` names it.
    ``prefix_tokens``: the first so many tokens, all before any image, may run or be cached before the rest of the
    prompt: they are the same in every stage and whatever follows.
    ``carried_from``: the last block boundary within them.
    ``has_run``: the counts are those of the caches once the prompt has run, which may be any.
    ``explains``: the request's report is to list the tokens that every stage kept.
    ``encoding``: how the vision tower makes its images' features, by name; :data:`DENSE` is stock vLLM's way.
    ``renumbered``: ids depend on how many tokens a stage drops, and merged tokens come first.
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
        """Whether any stage drops anything, or the method may decide so."""
        return self.adaptive or any(self.dropped)

    def bounded(self, stage: int, kept: Sequence[int]) -> "Plan":
        """The same with at most ``kept`` tokens of each image from ``stage`` on."""
        lower = tuple(tuple(map(min, counts, kept)) for counts in self.kept[stage:])
        return replace(self, kept=self.kept[:stage] + lower)

    def settled(self, kept: Sequence[Sequence[int]]) -> "Plan":
        """The plan with the counts that the worker decided.

        Raises:
            ValueError: a count exceeds its bound.
        """
        for stage, (bound, counts) in enumerate(zip(self.kept, kept, strict=True)):
            if any(count > most for count, most in zip(counts, bound, strict=True)):
                raise ValueError(f"stage {stage} keeps {counts}, more than the bound {bound}")
        return replace(self, kept=tuple(map(tuple, kept)), decided=True)

    def after_prefill(self, schedule: Schedule) -> "Plan":
        """What the caches hold once the prompt has run: fewer than ran where a stage caches fewer."""
        held = {Cached.FINAL: self.kept[-1], Cached.NONE: (0,) * len(self.spans)}
        if not self.adaptive:
            return self
        kept = tuple(held.get(stage.cached, ran) for stage, ran in zip(schedule.stages, self.kept, strict=True))
        return replace(self, kept=kept, has_run=True)

    def stage_tokens(self, stage: int, num_tokens: int) -> int:
        """Tokens of ``stage`` among the first ``num_tokens`` tokens of the request.

        A pruned prompt is prefilled in one step from some token of its prefix on, so ``num_tokens`` is within the
        prefix or at least the prompt length; or, where images are reused, the end of an image: then the stages from
        the first cut on hold their prefix only.
        """
        if num_tokens >= self.num_prompt_tokens:
            return num_tokens - self.dropped[stage]
        if not self.is_pruned or num_tokens <= self.prefix_tokens:
            return num_tokens
        return self.carried_from if stage >= self.first_cut else self.places[stage].count(num_tokens)

    @cached_property
    def places(self) -> tuple[StagePlaces, ...]:
        """Of every stage, where the prompt's tokens stand."""
        return tuple(StagePlaces(self.spans, kept) for kept in self.kept)

    def places_entering(self, stage: int) -> StagePlaces:
        """Where the prompt's tokens stand on entry to a stage: as in the stage before, or in the full prompt."""
        return self.places[stage - 1] if stage else StagePlaces(self.spans, tuple(span.length for span in self.spans))

    @cached_property
    def first_cut(self) -> int:
        """The first stage that selects tokens of an image; the number of stages where none does.

        Before it, what a stage holds of a token depends on nothing behind the token.
        """
        stages = ((span.length for span in self.spans), *self.kept)
        selects = (any(0 < n < m for n, m in zip(now, before, strict=True)) for before, now in pairwise(stages))
        return next((stage for stage, found in enumerate(selects) if found), len(self.kept))

    def num_carried(self, num_tokens: int) -> int:
        """Rows that enter the first cut for the tokens from ``carried_from`` to the end of an image."""
        return self.places_entering(self.first_cut).count(num_tokens) - self.carried_from

    def places_carried(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """Their prompt places, int64 [n]."""
        entering = self.places_entering(self.first_cut)
        whole = [np.arange(kept, dtype=np.int32) for kept in entering.kept]
        return entering.prompt_places(self.num_prompt_tokens, whole)[self.carried_from : entering.count(num_tokens)]


ENDS_WITH_IMAGE = "the prompt ends with an image: no text row is left to score from"
FALLBACKS = {ENDS_WITH_IMAGE: "ends_with_image"}
"""Why a request that could have been pruned is not, and the name of each in metrics."""


def make_plan(
    schedule: Schedule, num_prompt_tokens: int, spans: Iterable[Span], keep_all: bool = False, adaptive: bool = False
) -> Plan:
    """Resolve a schedule for one prompt.

    Args:
        schedule: the stages, with the request's own keeps if it has any.
        num_prompt_tokens: length of the full prompt, vision tokens included.
        spans: the images' places in the prompt.
        keep_all: everything everywhere, equal to the dense model (``off``).
        adaptive: the method decides how many stay; the schedule's keeps are upper bounds.

    Raises:
        ValueError: the keeps rise after injection for an image of this size.
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
