"""What tensor-parallel ranks, each with its own share of the heads, must agree on.

Nothing is exchanged where there is one rank.

A reduction may add in another order on every rank (vLLM's shared-memory kernel starts with its own rank's part), and a
last bit is enough to choose another token. So parts are gathered and added here, in rank order: the same on every rank.
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
    """Their mean: that over all heads, of means over each rank's equally many heads; one collective."""
    return sum_over_ranks(part) / get_tp_group().world_size


def first_ranks(same: torch.Tensor) -> torch.Tensor:
    """What the first rank holds, where all should hold the same; decisions made from it agree in every bit."""
    if get_tp_group().world_size == 1:
        return same
    return get_tp_group().broadcast(same.contiguous())
