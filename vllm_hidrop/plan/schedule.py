"""Schedules: which layers keep how many vision tokens, as host data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

KeepValue = str | int | float
"""What a user writes for a keep: ``"all"``, a count (int), a fraction (float in [0, 1]) or a share (``"10/576"``)."""

SHARE = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Keep:
    """How many vision tokens of each image a stage may hold: a count, a fraction, a share, or all.

    At most one of ``count`` (tokens) and ``fraction`` (of the image's tokens) is set; neither means all. A count
    ``per`` so many tokens is a share: images of another size keep as many in proportion, rounded, but at least one.
    """

    count: int | None = None
    fraction: Fraction | None = None
    per: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.fraction is not None:
            raise ValueError("a keep is a count or a fraction, not both")
        if self.count is not None and self.count < 0:
            raise ValueError(f"keep count must be >= 0, got {self.count}")
        if self.per is not None and (self.count is None or not 1 <= self.count <= self.per):
            raise ValueError(f"keep {self.count}/{self.per}: a share is of one token to all of them")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"keep fraction must be in [0, 1], got {float(self.fraction)}")

    @classmethod
    def parse(cls, value: KeepValue) -> Self:
        """Read a keep as users write it; ValueError unless it is "all", a share, an int >= 0 or a float in [0, 1]."""
        if value == "all":
            return cls()
        if isinstance(value, str) and (share := SHARE.fullmatch(value)):
            return cls(count=int(share[1]), per=int(share[2]))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f'keep must be "all", a count, a fraction or a share such as "10/576", got {value!r}')
        if isinstance(value, int):
            return cls(count=value)
        if not 0 <= value <= 1:
            raise ValueError(f"keep fraction must be in [0, 1], got {value}")
        return cls(fraction=Fraction(str(value)))

    def dump(self) -> KeepValue:
        """The keep as users write it; :meth:`parse` reads it."""
        if self.count is not None:
            return self.count if self.per is None else f"{self.count}/{self.per}"
        return "all" if self.fraction is None else float(self.fraction)

    def resolve(self, num_tokens: int) -> int:
        """Tokens kept of an image of ``num_tokens`` tokens; fractions round down."""
        if self.count is not None:
            count = self.count if self.per is None else max(1, round(Fraction(self.count * num_tokens, self.per)))
            return min(count, num_tokens)
        return num_tokens if self.fraction is None else int(self.fraction * num_tokens)

    @property
    def is_all(self) -> bool:
        """Whether every token is kept, whatever the image."""
        return self.count == self.per and self.fraction in (None, Fraction(1))

    @property
    def is_relative(self) -> bool:
        """Whether the number of tokens depends on the image's."""
        return self.count is None or self.per is not None

    @property
    def is_none(self) -> bool:
        """Whether no token is kept, whatever the image."""
        return self.count == 0 or self.fraction == 0


ALL = Keep()


class Cached(StrEnum):
    """Which vision tokens a stage's KV cache holds once the prompt has been prefilled."""

    KEPT = "kept"
    """The tokens that the stage ran with."""
    FINAL = "final"
    """Of the tokens that the stage ran with, those that the last stage kept."""
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

    Two invariants are checked here: a stage that keeps more than the stage before it keeps all, and the stage before
    it nothing (late injection: the tokens come from the projector); after injection keep never rises.
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

        ValueError names the invariant that layers or keeps break.
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
        """The schedule as JSON values, which vLLM's configuration carries from process to process."""
        return {
            "num_layers": self.num_layers,
            "keeps": {str(s.first_layer): s.keep.dump() for s in self.stages},
            "cached": {str(s.first_layer): str(s.cached) for s in self.stages if s.cached is not Cached.KEPT},
        }

    @cached_property
    def end_layers(self) -> tuple[int, ...]:
        """Per stage, the layer after its last one."""
        return (*(stage.first_layer for stage in self.stages[1:]), self.num_layers)

    @cached_property
    def layer_ranges(self) -> tuple[range, ...]:
        """The layers of every stage."""
        return tuple(range(stage.first_layer, end) for stage, end in zip(self.stages, self.end_layers, strict=True))

    def layers_in(self, stage: int) -> int:
        """Number of layers of a stage."""
        return len(self.layer_ranges[stage])

    def stage_of_layer(self, layer: int) -> int:
        """Index of the stage that holds ``layer``."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        return next(i for i, end in enumerate(self.end_layers) if layer < end)

    def with_keeps(self, keeps: Sequence[KeepValue]) -> "Schedule":
        """The same stages with a request's own keeps, one per stage."""
        if len(keeps) != len(self.stages):
            raise ValueError(f"this server has {len(self.stages)} stages, got {len(keeps)} keeps")
        stages = zip(self.stages, keeps, strict=True)
        return Schedule(tuple(replace(s, keep=Keep.parse(keep)) for s, keep in stages), self.num_layers)

    def kept(self, num_tokens: int) -> tuple[int, ...]:
        """Per stage, the tokens it keeps of an image of ``num_tokens`` tokens."""
        return tuple(stage.keep.resolve(num_tokens) for stage in self.stages)

    def mean_kept(self, num_tokens: int) -> float:
        """Tokens that a layer keeps of an image of ``num_tokens`` tokens, mean over all layers."""
        return self.mean_over_layers(self.kept(num_tokens))

    def mean_over_layers(self, per_stage: Sequence[int]) -> float:
        """The mean of one number per stage, each weighted by the stage's number of layers."""
        weighted = (len(layers) * number for layers, number in zip(self.layer_ranges, per_stage, strict=True))
        return sum(weighted) / self.num_layers


def check_keeps(keeps: Sequence[Keep]) -> None:
    """Check the two invariants of :class:`Schedule`, as far as keeps can be compared.

    A count and a fraction cannot until an image's size is known: :class:`Plan` checks the numbers that result.
    """
    for before, after in pairwise(keeps):
        if before.is_none and not after.is_none and not after.is_all:
            raise ValueError(
                f"late injection brings in every vision token: keep after 0 must be all or 0, got {after.dump()}"
            )
    first_kept = next((i for i, keep in enumerate(keeps) if not keep.is_none), len(keeps))
    for before, after in pairwise(keeps[first_kept:]):
        same_kind = before.is_relative == after.is_relative
        rises = (after.is_all and not before.is_all) or (before.is_none and not after.is_none)
        if rises or (same_kind and _amount(after) > _amount(before)):
            raise ValueError(f"keep must not rise after injection, got {before.dump()} then {after.dump()}")


def _amount(keep: Keep) -> Fraction:
    if keep.count is not None:
        return Fraction(keep.count, keep.per or 1)
    return Fraction(1) if keep.fraction is None else keep.fraction
