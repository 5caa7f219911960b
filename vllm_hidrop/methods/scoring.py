"""Signals and scores: what a method may look at, and one float32 score per vision token.

Knows tensors, not vLLM; knows one image at a time, not batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


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


@dataclass(frozen=True)
class Signals:
    """What is known about one image's surviving vision tokens at a cut.

    Attributes:
        layer: first layer of the new stage.
        keep: tokens the new stage keeps, 0 < keep < V; for a method that decides itself, at most so many.
        num_image_tokens: tokens the image had before any cut.
        survivors: int64 [V], index of every survivor inside its image, ascending unless merged tokens come first.
        attention: float32 [V], attention of the last prompt row to each survivor: softmax over all the request's
            rows, then mean over heads. None unless the method asks for a signal.
        contribution: None unless the method asks for it.
        text_attention: None unless the method asks for it.
        protected: bool [V], the tokens the encoder named as key tokens; None where no encoder does.
    """

    layer: int
    keep: int
    num_image_tokens: int
    survivors: torch.Tensor
    attention: torch.Tensor | None
    contribution: Contribution | None = None
    text_attention: TextAttention | None = None
    protected: torch.Tensor | None = None


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
    """The attention itself; HiDrop section 3.3, FastV section 4, PyramidDrop section 3."""
    assert signals.attention is not None
    return signals.attention


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
