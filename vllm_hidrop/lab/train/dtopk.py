"""Differentiable top-k (HiDrop section 3.2): a hard choice forward, a soft mask backward.

With N candidates, the rank of a score is ``c_i = (1 / N) sum_j [s_i >= s_j]`` and the mask
``m_i = sigmoid(N (c_i - a))`` with the dropped share ``a = 1 - k / N``; a token with ``m_i > 0.5`` is kept.

**Source** arXiv 2602.23699 section 3.2 (factor N from section 4.1).

**Differs** a count has no derivative, and the released code lets no gradient through at all. Here the backward pass
takes the rank's derivative from ``(1 / N) sum_j sigmoid((s_i - s_j) / tau)``, ``tau`` the standard deviation of the
scores times ``RANK_TEMPERATURE``: our choice, the paper names none. Dropped tokens are gone, so the gradient reaches
the mask of the survivors only.

The paper's factor N makes the mask a step: of 576 tokens the four or so on each side of the threshold learn. ``SMOOTH``
replaces it, in the backward pass, by a factor that lets every survivor learn, and ranks logarithms of the scores, whose
differences do not vanish with the attention (docs/accuracy.md has both).
"""

import torch
from torch import Tensor

RANK_TEMPERATURE = 0.1
SMOOTH = 16.0
"""Mask factor in place of N: the mask rises from 0.1 to 0.9 over a quarter of the candidates."""


def soft_rank(scores: Tensor, temperature: float = RANK_TEMPERATURE) -> Tensor:
    """Smooth stand-in for the normalised rank, [N] in (0, 1)."""
    scale = scores.detach().std().clamp_min(torch.finfo(scores.dtype).tiny) * temperature
    return torch.sigmoid((scores[:, None] - scores[None, :]) / scale).mean(1)


def hard_rank(scores: Tensor) -> Tensor:
    """Normalised rank, [N] in (0, 1]: the share of scores that are no higher."""
    return (scores[:, None] >= scores[None, :]).to(scores.dtype).mean(1)


def soft_mask(rank: Tensor, dropped_share: Tensor | float, factor: float | None = None) -> Tensor:
    """The paper's mask, [N] in (0, 1); ``dropped_share`` is a number or a learnable scalar, ``factor`` N by default."""
    return torch.sigmoid((rank.shape[0] if factor is None else factor) * (rank - dropped_share))


def gates(scores: Tensor, keep: int, dropped_share: Tensor | None = None, factor: float | None = None) -> Tensor:
    """A factor for every candidate, [N]: exactly 1 forward, with the soft mask's gradient backward.

    ``scores`` are float32 [N] with their graph, 0 < ``keep`` < N. ``dropped_share`` is a learnable scalar in (0, 1),
    None for the fixed ``1 - keep / N``; ``factor`` is :func:`soft_mask`'s.
    """
    smooth = soft_rank(scores)
    rank = hard_rank(scores.detach()) + (smooth - smooth.detach())
    share = 1 - keep / scores.shape[0] if dropped_share is None else dropped_share
    mask = soft_mask(rank, share, factor)
    return 1 + (mask - mask.detach())
