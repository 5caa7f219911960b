"""Statistics and scores of one image: what a method may look at, and one float32 score per vision token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch


class RowAttention(NamedTuple):
    """Attention of the last prompt row to V tokens (HiDrop section 3.3, FastV section 4, PyramidDrop section 3)."""

    weight: torch.Tensor
    """float32 [V], softmax over all the request's rows, then mean over heads."""


class Contribution(NamedTuple):
    """What each of V tokens adds to one row's attention output o, all heads side by side (VisiPruner eq. 6 to 8)."""

    norm: torch.Tensor
    """float32 [V], L2 norm of the token's share c of o."""
    cosine: torch.Tensor
    """float32 [V], cosine between o - c and o; 0 where c is all of o, NaN where o is zero."""


class TextAttention(NamedTuple):
    """Attention that V tokens get from the text rows behind them, mean over heads first (MustDrop section 3.2)."""

    total: torch.Tensor
    """float32 [V], sum over the text rows."""
    peak: torch.Tensor
    """float32 [V], maximum over the text rows."""


Statistic = tuple[torch.Tensor, ...]
"""A named tuple of [V] tensors, one of the above: what a signal comes to for one image."""
Kind = TypeVar("Kind", bound=Statistic)


@dataclass(frozen=True)
class Signals:
    """What is known about one image's surviving vision tokens at a cut.

    Attributes:
        layer: first layer of the new stage.
        keep: tokens the new stage keeps, 0 < keep < V; for a method that decides itself, at most so many.
        num_image_tokens: tokens the image had before any cut.
        survivors: int64 [V], index of every survivor inside its image, ascending unless merged tokens come first.
        statistic: of the survivors, by the method's signal; None where it asks for none.
        protected: bool [V], the tokens the encoder named as key tokens; None where no encoder does.
    """

    layer: int
    keep: int
    num_image_tokens: int
    survivors: torch.Tensor
    statistic: Statistic | None
    protected: torch.Tensor | None = None

    def read(self, kind: type[Kind]) -> Kind:
        """The statistic, which is of this kind."""
        assert isinstance(self.statistic, kind), f"needs {kind.__name__}, got {type(self.statistic).__name__}"
        return self.statistic


Scorer = Callable[[Signals], torch.Tensor]
"""Signals of one image -> float32 [V] scores; higher means keep."""


def select_top(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The ``keep`` highest scores, lowest index first among equals, in ascending order.

    Args:
        scores: float32 [V].
        keep: 0 < keep <= V.

    Returns:
        int64 [keep], indices into ``scores``. No host synchronisation.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:keep].sort().values


def attention_score(signals: Signals) -> torch.Tensor:
    """The last row's attention itself."""
    return signals.read(RowAttention).weight


def random_score(signals: Signals, seed: int) -> torch.Tensor:
    """A number that depends on seed, cut layer and the token's place in its image only."""
    table = np.random.default_rng([seed, signals.layer]).random(signals.num_image_tokens)
    table_on_device = torch.from_numpy(table.astype(np.float32)).to(signals.survivors.device)
    return table_on_device[signals.survivors]


def uniform_score(signals: Signals) -> torch.Tensor:
    """1 for survivors evenly spaced in reading order (the middle of ``keep`` equal bins), 0 for the rest."""
    num_survivors = signals.survivors.shape[0]
    bins = torch.arange(signals.keep, device=signals.survivors.device)
    chosen = (2 * bins + 1) * num_survivors // (2 * signals.keep)
    scores = torch.zeros(num_survivors, dtype=torch.float32, device=signals.survivors.device)
    return scores.index_fill_(0, chosen, 1.0)
