"""The residual add and norm of the staged loop.

vLLM's CPU build has a fused kernel for both, but calls plain PyTorch and leaves the fusion to its compiler. The staged
loop is not compiled, so it calls the kernel: a fifth of the time (docs/performance.md).
"""

from typing import Any

import torch

NormedPair = tuple[torch.Tensor, torch.Tensor]


def add_norm(norm: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> NormedPair:
    """Add the last block's output ``hidden`` [T, C] to ``residual`` [T, C], and norm the sum: (normed, sum).

    ``residual`` is None before the first layer.
    """
    if residual is None:
        return norm(hidden), hidden
    normed, residual = norm(hidden, residual)
    return normed, residual


def fused_add_norm(norm: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> NormedPair:
    """:func:`add_norm` by the CPU kernel, in place in both tensors, which the staged loop owns."""
    if residual is None:
        return norm(hidden), hidden
    torch.ops._C.fused_add_rms_norm(hidden, residual, norm.weight, norm.variance_epsilon)
    return hidden, residual


def can_fuse(norm: Any) -> bool:
    """Whether the model's norms are plain RMS norms on CPU and the kernel is there."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.platforms import current_platform

    is_plain = type(norm) is RMSNorm and norm.variance_size_override is None and norm.has_weight
    return is_plain and current_platform.is_cpu() and hasattr(torch.ops._C, "fused_add_rms_norm")
