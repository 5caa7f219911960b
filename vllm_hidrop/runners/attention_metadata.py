"""Attention metadata that KV cache groups with the same rows share."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_hidrop.engine.gate import check_attention_backend


def check_attention_backends(attention_groups: Iterable[Iterable[AttentionGroup]]) -> None:
    """Refuse a backend that stages do not know, by the attention groups of every KV cache group."""
    for groups in attention_groups:
        for group in groups:
            check_attention_backend(group.backend.get_name())


def with_tables(builder: Any, metadata: Any, table: torch.Tensor, slots: torch.Tensor) -> Any | None:
    """``metadata`` for another group with the same rows, block table [R, B] and slots [T]; None: it must be built.

    Backends that can say so (``supports_update_block_table``); the CPU's keeps both as they are, but does not say so.
    FlashInfer plans a group's pages when it builds, so each group needs its own.
    """
    if builder.supports_update_block_table:
        return builder.update_block_table(metadata, table, slots)
    if isinstance(metadata, CPUAttentionMetadata):
        shared = copy.copy(metadata)
        shared.block_table, shared.slot_mapping = table, slots
        return shared
    return None
