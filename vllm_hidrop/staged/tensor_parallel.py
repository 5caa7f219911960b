"""Sums, means and broadcasts over tensor-parallel ranks, equal to the bit on every rank; nothing is sent by one alone.

Each rank has its own share of the heads. vLLM's all-reduce may add in another order on every rank (its shared-memory
kernel starts with its own rank's part), and a last bit is enough to choose another token. So parts are gathered and
added here, in rank order.
"""

import torch
from vllm.distributed import get_tp_group


def sum_over_ranks(part: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' parts, of any shape, with the same bits on every rank; one collective."""
    group = get_tp_group()
    if group.world_size == 1:
        return part
    return group.all_gather(part[None].contiguous(), dim=0).sum(0)


def mean_over_ranks(part: torch.Tensor) -> torch.Tensor:
    """The mean over all heads, from each rank's mean over its own heads, equally many; one collective."""
    return sum_over_ranks(part) / get_tp_group().world_size


def first_ranks(same: torch.Tensor) -> torch.Tensor:
    """The first rank's tensor, where all ranks should hold the same: decisions made from it agree to the bit."""
    if get_tp_group().world_size == 1:
        return same
    return get_tp_group().broadcast(same.contiguous())
