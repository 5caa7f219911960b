"""A vision tower's attention by vLLM's own CPU kernel.

On CPU, vLLM runs a tower's attention with PyTorch's SDPA. Its paged kernel, given each image as a request without
causal mask, takes half the time at the same error (docs/performance.md). Unpruned requests keep SDPA: their features
are stock vLLM's to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

BLOCK_SIZE = 32
DTYPES = (torch.float32, torch.bfloat16)
KERNEL = "kernel"
"""First part of the name of every encoding that uses the kernel, see ``Plan.encoding``."""


def has_tower_kernel(vision_config: Any, dtype: torch.dtype) -> bool:
    """Whether this platform's kernel can run a tower, by its configuration alone: the same in every process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or dtype not in DTYPES:
        return False
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_size = vision_config.hidden_size // vision_config.num_attention_heads
    return head_size in CPUAttentionBackend.get_supported_head_sizes()


@dataclass(frozen=True)
class Pages:
    """Scratch pages for a batch of B images of L rows each, as vLLM's kernel takes them.

    Attributes:
        row_starts: int32 [B + 1], first row of every image, then the number of all rows.
        lengths: int32 [B], rows of every image.
        blocks: int32 [B, blocks per image], block ids.
        slots: int64 [B * L], the slot of every row.
        cache: [blocks, H, BLOCK_SIZE, 2 * D].
    """

    row_starts: torch.Tensor
    lengths: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    metadata: torch.Tensor
    cache: torch.Tensor

    @classmethod
    def of(cls, num_images: int, length: int, like: torch.Tensor, isa: str) -> Self:
        """Pages for K and V of ``like``'s heads, head size and dtype, [B * L, H, D]."""
        from vllm import _custom_ops as ops

        heads, head_size = like.shape[1:]
        per_image = -(-length // BLOCK_SIZE)
        blocks = torch.arange(num_images * per_image, dtype=torch.int32).view(num_images, per_image)
        row_starts = torch.arange(num_images + 1, dtype=torch.int32) * length
        lengths = torch.full((num_images,), length, dtype=torch.int32)
        slots = torch.arange(length) + torch.arange(num_images)[:, None] * per_image * BLOCK_SIZE
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_images, heads, heads, head_size, lengths, like.dtype, row_starts, False, -1, isa, True
        )
        cache = like.new_zeros(blocks.numel(), heads, BLOCK_SIZE, 2 * head_size)
        return cls(row_starts, lengths, blocks, slots.flatten(), metadata, cache)


class TowerKernel:
    """Switches a tower's attention modules, which are all alike, to the kernel and back."""

    def __init__(self, attentions: list[Any]) -> None:
        self.attentions = attentions
        self.key: tuple[Any, ...] = ()
        self.pages: Pages | None = None

    @classmethod
    def of(cls, tower: nn.Module) -> "TowerKernel":
        """The switch of a tower for which :func:`has_tower_kernel` holds."""
        from vllm.model_executor.layers.attention import MMEncoderAttention

        attentions = [module for module in tower.modules() if isinstance(module, MMEncoderAttention)]
        assert attentions
        assert all(each.num_kv_heads == each.num_heads for each in attentions)
        return cls(attentions)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the tower with the kernel until exit."""
        before = [attention._forward_method for attention in self.attentions]
        for attention in self.attentions:
            attention._forward_method = partial(self.attend, attention)
        try:
            yield
        finally:
            for attention, method in zip(self.attentions, before, strict=True):
                attention._forward_method = method

    def attend(self, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The attention module's output for query, key and value, all [B, L, H * D]."""
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        num_images, length, _ = query.shape
        rows = (-1, attention.num_heads, attention.head_size)
        query, key, value = query.reshape(rows), key.reshape(rows), value.reshape(rows)
        isa = _get_attn_isa(key.dtype, BLOCK_SIZE, attention.head_size)
        pages = self._pages(num_images, length, key, isa)
        key_cache, value_cache = pages.cache.view(*pages.cache.shape[:2], 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, pages.slots, isa)
        output = torch.empty(query.shape, dtype=query.dtype)
        ops.cpu_attention_with_kv_cache(
            query,
            key_cache,
            value_cache,
            output,
            pages.row_starts,
            pages.lengths,
            attention.scale,
            False,
            None,
            -1,
            pages.blocks,
            0.0,
            pages.metadata,
            None,
        )
        return output.view(num_images, length, -1)

    def _pages(self, num_images: int, length: int, like: torch.Tensor, isa: str) -> Pages:
        """Scratch pages, which all layers of a tower share; made anew only when the batch's shape or dtype changes."""
        key = num_images, length, like.shape[1:], like.dtype
        if self.pages is None or self.key != key:
            self.key, self.pages = key, Pages.of(num_images, length, like, isa)
        return self.pages
