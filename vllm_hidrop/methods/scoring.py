"""What a scorer may look at, and scorers: one float32 score per vision token of one image."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch


class RowAttention(NamedTuple):
    """Attention of the last prompt row to V tokens (HiDrop section 3.3, FastV section 4, PyramidDrop section 3)."""

    weight: torch.Tensor
    """float32 [V], softmax over all rows of the request, then mean over heads."""


class Contribution(NamedTuple):
    """What each of V tokens adds to the last row's attention output o, heads concatenated (VisiPruner eq. 6 to 8)."""

    norm: torch.Tensor
    """float32 [V], ||c||, where c is what the token adds."""
    cosine: torch.Tensor
    """float32 [V], cos(o - c, o); 0 where c is all of o, NaN where o is zero."""


class TextAttention(NamedTuple):
    """Attention that V tokens get from the text rows behind them, mean over heads first (MustDrop section 3.2)."""

    total: torch.Tensor
    """float32 [V], sum over the text rows."""
    peak: torch.Tensor
    """float32 [V], maximum over the text rows."""


Statistic = tuple[torch.Tensor, ...]
"""The values of a signal for one image: one of the named tuples above, of [V] tensors."""
Kind = TypeVar("Kind", bound=Statistic)


@dataclass(frozen=True)
class Signals:
    """What a method may look at: one image's V surviving vision tokens at a cut.

    Attributes:
        layer: first layer of the new stage.
        keep: tokens that the new stage keeps, 0 < keep < V; an adaptive method's upper bound.
        num_image_tokens: tokens of the image before any cut.
        survivors: int64 [V], index of every survivor inside its image, ascending unless merged tokens come first.
        statistic: values of the method's signal; None where it asks for none.
        protected: bool [V], key tokens of the encoder selection; None where there is none.
    """

    layer: int
    keep: int
    num_image_tokens: int
    survivors: torch.Tensor
    statistic: Statistic | None
    protected: torch.Tensor | None = None

    def read(self, kind: type[Kind]) -> Kind:
        """The statistic, asserted to be of this kind."""
        assert isinstance(self.statistic, kind), f"needs {kind.__name__}, got {type(self.statistic).__name__}"
        return self.statistic


Scorer = Callable[[Signals], torch.Tensor]
"""Signals of one image -> float32 [V] scores; higher means keep."""


def select_top(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the ``keep`` highest of ``scores``, float32 [V]: int64 [keep], ascending; at ties the lowest index.

    No host synchronisation.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:keep].sort().values


def attention_score(signals: Signals) -> torch.Tensor:
    """The last row's attention itself."""
    return signals.read(RowAttention).weight


def random_score(signals: Signals, seed: int) -> torch.Tensor:
    """A random number that depends only on seed, cut layer and the token's place in its image."""
    return _random_table(seed, signals.layer, signals.num_image_tokens, signals.survivors.device)[signals.survivors]


@lru_cache(maxsize=256)
def _random_table(seed: int, layer: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """The same numbers in every step, so they are uploaded once: float32 [num_tokens]."""
    table = np.random.default_rng([seed, layer]).random(num_tokens)
    return torch.from_numpy(table.astype(np.float32)).to(device)


def uniform_score(signals: Signals) -> torch.Tensor:
    """1 for survivors evenly spaced in reading order (the middle of ``keep`` equal bins), 0 for the rest."""
    num_survivors = signals.survivors.shape[0]
    bins = torch.arange(signals.keep, device=signals.survivors.device)
    chosen = (2 * bins + 1) * num_survivors // (2 * signals.keep)
    scores = torch.zeros(num_survivors, dtype=torch.float32, device=signals.survivors.device)
    return scores.index_fill_(0, chosen, 1.0)
