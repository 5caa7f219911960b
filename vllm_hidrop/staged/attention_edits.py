"""The attention outputs of the rows that a method's edit changes; see ``AttentionEdit``."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.methods.adaptive import AttentionEdit, Sight

MAX_WEIGHTS = 1 << 22
"""Attention weights computed at a time, all heads together: 16 MiB in float32."""


@dataclass(frozen=True)
class Heads:
    """One prompt's rows in one layer: query [P, H, D], key and value [P, G, D], G divides H."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


Images = list[tuple[int, int]]
"""First row and number of rows of every image of a prompt, in order."""


def edited_rows(edit: AttentionEdit, heads: Heads, images: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows that an edit changes and their attention outputs, tile by tile: (int64 [n], [n, H, D]) pairs.

    Without renormalisation the values are edited in place of the weights, with the same result: a token whose weight
    would become 0 gets value 0, a token whose weight would move to another token gets that token's value. Blind vision
    rows without renormalisation are left to the caller: the attention kernel, given such values, is faster for so many.
    """
    is_vision = np.zeros(len(heads.query), dtype=np.bool_)
    for first, length in images:
        is_vision[first : first + length] = True
    first_vision = images[0][0]
    text_rows = np.flatnonzero(~is_vision[first_vision:]) + first_vision
    unseen = np.flatnonzero(_is_unseen(edit.text_sees, images, len(is_vision)))
    value = heads.value if edit.renormalise else _edited_value(edit.text_sees, heads.value, images, unseen)
    for rows in _tiles(text_rows, heads):
        yield _attend(heads, value, rows, unseen if edit.renormalise else None)
    if edit.vision_is_blind and edit.renormalise:
        vision = np.flatnonzero(is_vision)
        for rows in _tiles(vision, heads):
            yield _attend(heads, heads.value, rows, vision)


def _is_unseen(sight: Sight, images: Images, num_rows: int) -> npt.NDArray[np.bool_]:
    is_unseen = np.zeros(num_rows, dtype=np.bool_)
    num_seen_first = 1 if sight is Sight.FIRST else 0
    for first, length in images:
        end = first + (length // 2 if sight is Sight.SECOND_HALF else length)
        is_unseen[first + num_seen_first : end] = True
    return is_unseen


def _edited_value(sight: Sight, value: torch.Tensor, images: Images, unseen: npt.NDArray[np.int64]) -> torch.Tensor:
    edited = value.index_fill(0, async_tensor_h2d(unseen, device=value.device), 0)
    if sight is Sight.FIRST:
        for first, length in images:
            edited[first : first + length] = value[first]
    return edited


def _tiles(rows: npt.NDArray[np.int64], heads: Heads) -> Iterator[torch.Tensor]:
    num_rows, num_heads, _ = heads.query.shape
    size = max(1, MAX_WEIGHTS // (num_rows * num_heads))
    for start in range(0, len(rows), size):
        yield async_tensor_h2d(rows[start : start + size], device=heads.query.device)


def _attend(
    heads: Heads, value: torch.Tensor, rows: torch.Tensor, unseen: npt.NDArray[np.int64] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of some rows, int64 [n], with the keys of ``unseen`` rows masked: rows and output [n, H, D]."""
    sees = torch.arange(len(heads.key), device=rows.device) <= rows[:, None]
    if unseen is not None:
        sees.index_fill_(1, async_tensor_h2d(unseen, device=rows.device), False)
    query, key, value = (t.transpose(0, 1)[None] for t in (heads.query[rows], heads.key, value))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=heads.scale, enable_gqa=True)
    return rows, attended[0].transpose(0, 1).masked_fill(~sees.any(1)[:, None, None], 0)
