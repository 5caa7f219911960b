"""Schedules and plans: which layers keep how many vision tokens, as host data.

Knows nothing of vLLM, of tensors or of how tokens are scored.

Axes used throughout the package: requests R, rows T, vision tokens V, heads H, head size D, layers L.
Layers are zero-based and layer ranges half-open.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

KeepValue = str | int | float
"""What a user writes for a keep: ``"all"``, a token count (int) or a fraction (float in [0, 1])."""


@dataclass(frozen=True)
class Keep:
    """How many vision tokens of each image a stage may hold: a count, a fraction, or all.

    Exactly one of ``count`` (tokens) and ``fraction`` (of the image's tokens) is set; both ``None`` means all.
    """

    count: int | None = None
    fraction: Fraction | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.fraction is not None:
            raise ValueError("a keep is a count or a fraction, not both")
        if self.count is not None and self.count < 0:
            raise ValueError(f"keep count must be >= 0, got {self.count}")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"keep fraction must be in [0, 1], got {float(self.fraction)}")

    @classmethod
    def parse(cls, value: KeepValue) -> Self:
        """Read a keep as users write it.

        Raises:
            ValueError: ``value`` is none of "all", an int >= 0 or a finite float in [0, 1].
        """
        if isinstance(value, bool):
            raise ValueError(f'keep must be "all", a count or a fraction, got {value!r}')
        if isinstance(value, str):
            if value != "all":
                raise ValueError(f'keep must be "all", a count or a fraction, got {value!r}')
            return cls()
        if isinstance(value, int):
            return cls(count=value)
        if not isinstance(value, float):
            raise ValueError(f'keep must be "all", a count or a fraction, got {value!r}')
        if not 0 <= value <= 1:
            raise ValueError(f"keep fraction must be in [0, 1], got {value}")
        return cls(fraction=Fraction(str(value)))

    def dump(self) -> KeepValue:
        """The value that :meth:`parse` reads back."""
        if self.count is not None:
            return self.count
        return "all" if self.fraction is None else float(self.fraction)

    def resolve(self, num_tokens: int) -> int:
        """Tokens kept of an image of ``num_tokens`` tokens; fractions round down."""
        if self.count is not None:
            return min(self.count, num_tokens)
        return num_tokens if self.fraction is None else int(self.fraction * num_tokens)

    @property
    def is_all(self) -> bool:
        """Whether every token is kept, whatever the image."""
        return self.count is None and self.fraction in (None, Fraction(1))

    @property
    def is_none(self) -> bool:
        """Whether no token is kept, whatever the image."""
        return self.count == 0 or self.fraction == 0


ALL = Keep()
NOTHING = Keep(count=0)


class Cached(StrEnum):
    """Which vision tokens a stage's KV cache holds once the prompt has been prefilled."""

    KEPT = "kept"
    """Those the stage ran with."""
    FINAL = "final"
    """Of those, the ones that the last stage kept."""
    NONE = "none"


@dataclass(frozen=True)
class Stage:
    """A run of consecutive decoder layers that hold one set of vision tokens."""

    first_layer: int
    keep: Keep
    cached: Cached = Cached.KEPT


@dataclass(frozen=True)
class Schedule:
    """The ordered stages that cover every decoder layer exactly once.

    Two invariants, checked here: a stage that keeps more than the one before it takes its tokens from the projector
    (late injection: from nothing to all); after injection keep never rises.
    """

    stages: tuple[Stage, ...]
    num_layers: int

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].first_layer != 0:
            raise ValueError("a schedule must start at layer 0")
        firsts = [stage.first_layer for stage in self.stages]
        if any(b <= a for a, b in pairwise(firsts)):
            raise ValueError(f"first layers must rise, got {firsts}")
        if firsts[-1] >= self.num_layers:
            raise ValueError(f"a stage starts at layer {firsts[-1]}, the model has {self.num_layers}")
        check_keeps([stage.keep for stage in self.stages])

    @classmethod
    def of(
        cls, keeps: Mapping[int, KeepValue], num_layers: int, cached: Mapping[int, Cached | str] | None = None
    ) -> Self:
        """Build from ``{first_layer: keep}`` as users write it, and ``{first_layer: cached}`` where it is not KEPT.

        Raises:
            ValueError: the layers or keeps break an invariant; the message names it.
        """
        cached = cached or {}
        stages = tuple(
            Stage(first, Keep.parse(keep), Cached(cached.get(first, Cached.KEPT)))
            for first, keep in sorted(keeps.items())
        )
        return cls(stages, num_layers)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`dump` wrote."""
        cached = {int(k): v for k, v in data.get("cached", {}).items()}
        return cls.of({int(k): v for k, v in data["keeps"].items()}, data["num_layers"], cached)

    def dump(self) -> dict[str, Any]:
        """Plain data (JSON-able), so that a schedule can travel inside an engine configuration."""
        return {
            "num_layers": self.num_layers,
            "keeps": {str(s.first_layer): s.keep.dump() for s in self.stages},
            "cached": {str(s.first_layer): str(s.cached) for s in self.stages if s.cached is not Cached.KEPT},
        }

    @cached_property
    def end_layers(self) -> tuple[int, ...]:
        """Exclusive last layer of every stage."""
        return (*(stage.first_layer for stage in self.stages[1:]), self.num_layers)

    def layers_in(self, stage: int) -> int:
        """Number of layers of a stage."""
        return self.end_layers[stage] - self.stages[stage].first_layer

    def stage_of_layer(self, layer: int) -> int:
        """Index of the stage that holds ``layer``."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        return next(i for i, end in enumerate(self.end_layers) if layer < end)

    def with_keeps(self, keeps: Sequence[KeepValue]) -> "Schedule":
        """The same stages with other keeps, one per stage (a request's own wish)."""
        if len(keeps) != len(self.stages):
            raise ValueError(f"this server has {len(self.stages)} stages, got {len(keeps)} keeps")
        stages = zip(self.stages, keeps, strict=True)
        return Schedule(tuple(replace(s, keep=Keep.parse(keep)) for s, keep in stages), self.num_layers)

    def kept(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens of one image of ``num_tokens`` tokens held in every stage."""
        return tuple(stage.keep.resolve(num_tokens) for stage in self.stages)

    def mean_kept(self, num_tokens: int) -> float:
        """Vision tokens of one image, mean over all layers."""
        kept = self.kept(num_tokens)
        return sum(k * self.layers_in(i) for i, k in enumerate(kept)) / self.num_layers


def check_keeps(keeps: Sequence[Keep]) -> None:
    """Check the two invariants of :class:`Schedule` on abstract keeps.

    Counts and fractions are not comparable until an image's size is known; :class:`Plan` checks the numbers.
    """
    for before, after in pairwise(keeps):
        if before.is_none and not after.is_none and not after.is_all:
            raise ValueError(
                f"late injection brings in every vision token: keep after 0 must be all or 0, got {after.dump()}"
            )
    first_kept = next((i for i, keep in enumerate(keeps) if not keep.is_none), len(keeps))
    held = keeps[first_kept:]
    for before, after in pairwise(held):
        same_kind = (before.count is None) == (after.count is None)
        rises = (after.is_all and not before.is_all) or (before.is_none and not after.is_none)
        if rises or (same_kind and _amount(after) > _amount(before)):
            raise ValueError(f"keep must not rise after injection, got {before.dump()} then {after.dump()}")


def _amount(keep: Keep) -> Fraction:
    if keep.count is not None:
        return Fraction(keep.count)
    return Fraction(1) if keep.fraction is None else keep.fraction


@dataclass(frozen=True)
class Span:
    """Where one image's vision tokens stand in the full prompt: ``[offset, offset + length)``."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Exclusive end position."""
        return self.offset + self.length


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
        return self.carried_from if stage >= self.first_cut else self.before_cut(stage, num_tokens)

    def before_cut(self, stage: int, num_tokens: int) -> int:
        """Tokens of a stage before the first cut among the first tokens of the prompt, whole images only."""
        images = [image for image, span in enumerate(self.spans) if span.offset < num_tokens]
        assert all(self.spans[image].end <= num_tokens for image in images), "an image cannot be split"
        return num_tokens - sum(self.spans[image].length - self.kept[stage][image] for image in images)

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
        return self.before_cut(self.first_cut - 1, num_tokens) - self.carried_from

    def places_carried(self, num_tokens: int) -> list[int]:
        """Their places in the prompt."""
        gone = {
            place
            for span, kept in zip(self.spans, self.kept[self.first_cut - 1], strict=True)
            for place in range(span.offset, span.end)
            if not kept
        }
        return [place for place in range(self.carried_from, num_tokens) if place not in gone]


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
