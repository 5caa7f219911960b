"""Attention metadata that KV cache groups with the same rows share."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.utils import AttentionGroup

from vllm_hidrop.engine.gate import check_attention_backend


def check_attention_backends(attention_groups: Iterable[Iterable[AttentionGroup]]) -> None:
    """Refuse a backend that stages do not know, by the attention groups of every KV cache group."""
    for groups in attention_groups:
        for group in groups:
            check_attention_backend(group.backend.get_name())


def kernel_blocks(group: AttentionGroup, blocks: torch.Tensor) -> torch.Tensor:
    """The ids of the kernel's blocks in a request's ``blocks``, int32 [B], in order.

    A backend may address smaller blocks than vLLM allocates, which hybrid models make large. Unlike
    ``map_to_kernel_block_table`` this leaves the table that the running step's metadata holds as it is.
    """
    if group.kernel_block_size is None:
        return blocks
    num_each = group.kv_cache_spec.block_size // group.kernel_block_size
    within = torch.arange(num_each, dtype=blocks.dtype, device=blocks.device)
    return (blocks[:, None] * (group.kernel_block_stride or num_each) + within).flatten()


def with_tables(builder: Any, metadata: Any, table: torch.Tensor, slots: torch.Tensor) -> Any | None:
    """``metadata`` for another group with the same rows, block table [R, B] and slots [T]; None: it must be built.

    Backends that can say so (``supports_update_block_table``); the CPU's keeps both as they are, but does not say so,
    and those of recurrent layers read a state's index from the table: outside graphs, they could say so as well.
    FlashInfer plans a group's pages when it builds, so each group needs its own.
    """
    if builder.supports_update_block_table or isinstance(builder.kv_cache_spec, MambaSpec):
        return builder.update_block_table(metadata, table, slots)
    if isinstance(metadata, CPUAttentionMetadata):
        shared = copy.copy(metadata)
        shared.block_table, shared.slot_mapping = table, slots
        return shared
    return None
