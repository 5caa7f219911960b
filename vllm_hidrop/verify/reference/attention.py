"""Attention weights and the choice of tokens: what all references share.

Axes: T rows of one pass, H query heads, G key/value heads, D head size, C hidden size.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

Kept = list[list[int]]
"""Per image the visible vision tokens: ascending, 0-based inside the image."""


class Heads(NamedTuple):
    """Rotated query [H, T, D], rotated key [G, T, D] and value [G, T, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def top_indices(scores: torch.Tensor, keep: int) -> list[int]:
    """Ascending indices of the ``keep`` highest of [M] scores; of equal ones the lowest index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:keep].tolist())


def uniform_indices(num_survivors: int, keep: int) -> list[int]:
    """The ranks floor((i + 0.5) * num_survivors / keep), i = 0 .. keep - 1, in exact integers."""
    return [(2 * i + 1) * num_survivors // (2 * keep) for i in range(keep)]


def random_scores(seed: int, layer: int, num_tokens: int) -> torch.Tensor:
    """[V] scores of the vision tokens of any image of ``num_tokens``, for a cut at ``layer``."""
    return torch.from_numpy(np.random.default_rng([seed, layer]).random(num_tokens)).float()


def attention_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax [H, Q, T] of query [H, Q, D] on key [G, T, D] with an additive mask [Q, T]."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    return torch.softmax(scores + mask, dim=-1, dtype=torch.float32)


def additive_mask(visible: torch.Tensor) -> torch.Tensor:
    """[T, T] mask, 0 or -inf: a row sees itself and the visible rows before it; ``visible`` is [T], or [T, T] by row.

    Only an invisible row gains by "itself": its softmax stays finite, and nobody sees the result.
    """
    num_rows = len(visible)
    itself = torch.eye(num_rows, dtype=torch.bool, device=visible.device)
    allowed = torch.ones_like(itself).tril() & (visible | itself)
    return torch.zeros(num_rows, num_rows, device=visible.device).masked_fill(~allowed, -torch.inf)


class MaskedWeights:
    """Makes the weights [H, T, T] of a layer under an additive mask [T, T], and remembers the layer's ``heads``."""

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        self.heads: Heads

    def __call__(self, heads: Heads) -> torch.Tensor:
        """The weights of ``heads``."""
        self.heads = heads
        return attention_weights(heads.query, heads.key, self._mask)


def load_model(model: Any, dtype: torch.dtype) -> Any:
    """A model in evaluation mode, from its directory or as it is. Raises ValueError: missing weights, another type."""
    if isinstance(model, str | Path):
        model, found = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, output_loading_info=True)
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        if wrong:
            raise ValueError(f"weights that the checkpoint does not hold: {wrong[:5]}")
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"the oracle computes in {name}, got a model in another dtype")
    return model.eval()
