"""Causal attention of samples that lie one behind the other, by one of three back ends with the same result.

Axes: N rows of all samples together, B samples, H query heads, G key/value heads (H a multiple of G), D head size.
``row_starts`` int32 [B + 1], in host memory so that nothing waits for a device: where each sample starts, then N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_hidrop.lab.train.rows import packed_starts

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""Query [N, H, D], key and value [N, G, D] of one dtype, ``row_starts``, scale of the logits -> [N, H, D]."""
HALF = (torch.float16, torch.bfloat16)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, row_starts: Tensor, scale: float) -> Tensor:
    """By the kernel for sequences of varying length, which pads head sizes to a multiple of 8 itself."""
    from flash_attn import flash_attn_varlen_func

    starts, longest = row_starts.to(query.device, non_blocking=True), int(row_starts.diff().max())
    attended: Tensor = flash_attn_varlen_func(
        query, key, value, starts, starts, longest, longest, softmax_scale=scale, causal=True
    )
    return attended


def _xformers(query: Tensor, key: Tensor, value: Tensor, row_starts: Tensor, scale: float) -> Tensor:
    """Under the block-diagonal causal mask; heads are repeated, as grouped ones have no backward pass there."""
    from xformers.ops import fmha

    group, size = query.shape[1] // key.shape[1], query.shape[2]
    parts = query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    padded = (F.pad(part, (0, -size % 8))[None] for part in parts)
    mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(_lengths(row_starts), device=query.device)
    attended: Tensor = fmha.memory_efficient_attention(*padded, attn_bias=mask, scale=scale)
    return attended[0, ..., :size]


def _pytorch(query: Tensor, key: Tensor, value: Tensor, row_starts: Tensor, scale: float) -> Tensor:
    """Sample by sample: the reference."""
    lengths, is_grouped = _lengths(row_starts), query.shape[1] != key.shape[1]
    queries, keys, values = (part.transpose(0, 1)[None].split(lengths, 2) for part in (query, key, value))
    attended = [
        F.scaled_dot_product_attention(*sample, None, 0.0, True, scale=scale, enable_gqa=is_grouped)
        for sample in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


def _lengths(row_starts: Tensor) -> list[int]:
    """Rows of the samples that have any."""
    return [length for length in row_starts.diff().tolist() if length]


@dataclass(frozen=True)
class Backend:
    """One way to compute packed attention.

    Attributes:
        package: import name of what it needs beside PyTorch, None for nothing; its extra has the back end's name.
        dtypes: what its kernels take, on CUDA devices only; not asked where ``package`` is None.
        max_head_size: the largest head size they take.
    """

    name: str
    attend: Kernel
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    max_head_size: int = 0

    def refusal(self, device: str, dtype: torch.dtype, head_size: int) -> str | None:
        """Why it cannot attend with such queries; None where it can."""
        if self.package is None:
            return None
        if find_spec(self.package) is None:
            return f'is not installed: pip install "vllm-hidrop[{self.name}]"'
        return self._misfit(device, dtype, head_size) or _import_fault(self.package)

    def _misfit(self, device: str, dtype: torch.dtype, head_size: int) -> str | None:
        if device != "cuda":
            return f"runs on CUDA devices only, not on {device}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(map(_name, self.dtypes))}, not {_name(dtype)}"
        if head_size > self.max_head_size:
            return f"takes heads of at most {self.max_head_size}, not {head_size}"
        return None


def _import_fault(package: str) -> str | None:
    try:
        import_module(package)
    except (ImportError, OSError) as error:  # built for another PyTorch
        return f"cannot be imported: {error}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PYTORCH = Backend("pytorch", _pytorch)
BACKENDS = (
    Backend("flash-attn", _flash_attn, "flash_attn", HALF, 256),
    Backend("xformers", _xformers, "xformers", (*HALF, torch.float32), 65_536),
    PYTORCH,
)
"""The fastest first, by their authors' word: the kernels of the first two have never run in this project."""


def choose_backend(name: str, device: str, dtype: torch.dtype, head_size: int) -> Backend:
    """The back end called ``name``, or for "auto" the first of ``BACKENDS`` that can attend with such queries.

    ``device`` is a type, such as "cuda"; ``head_size`` includes the dimension that ``presence`` adds. Raises
    ValueError: the named one cannot, and why.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if backend.refusal(device, dtype, head_size) is None)
    backend = next(backend for backend in BACKENDS if backend.name == name)
    refusal = backend.refusal(device, dtype, head_size)
    if refusal is not None:
        raise ValueError(f"attention: {name} {refusal}")
    return backend


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    presence: Tensor | None = None,
    backend: Backend = PYTORCH,
) -> Tensor:
    """Causal attention [N, H, D] of query [N, H, D] over key and value [N, G, D], each row within its sample.

    ``presence`` [N] scales a row's terms in the softmax's sums: its logarithm is one more dimension of the keys. The
    result has value's dtype (RoPE's tables, and so query and key, are float32 where autocast projects in half).
    """
    size = query.shape[2]
    query, key = query.to(value.dtype), key.to(value.dtype)
    if presence is not None:
        one = query.new_full((), size**0.5).expand(*query.shape[:2], 1)
        logarithm = presence.log().to(key.dtype)[:, None, None].expand(-1, key.shape[1], -1)
        query, key, value = torch.cat([query, one], -1), torch.cat([key, logarithm], -1), F.pad(value, (0, 1))
    return backend.attend(query, key, value, row_starts, size**-0.5)[..., :size]


class BackendCheck(NamedTuple):
    """How a back end did here: ``max_error`` relative to the largest value, or the ``reason`` why it did not run.

    ``is_usable`` says whether it should have: then the reason is what its kernel raised.
    """

    name: str
    is_usable: bool
    max_error: float | None
    reason: str | None


CHECKED_LENGTHS, CHECKED_HEADS = (1, 37, 150, 0, 64), (8, 2, 64)
"""Samples of the check, and its H, G, D."""


def checked_backends() -> list[BackendCheck]:
    """Every back end against PyTorch's in float32: result and gradients, with and without presence.

    On the first CUDA device in bfloat16, else on the CPU in float32. Errors of a kernel are its ``reason``.
    """
    has_cuda = torch.cuda.is_available()
    device = "cuda" if has_cuda else "cpu"
    dtype = torch.bfloat16 if has_cuda else torch.float32
    return [checked(backend, device, dtype) for backend in BACKENDS]


def checked(backend: Backend, device: str, dtype: torch.dtype) -> BackendCheck:
    """One back end, with tensors of this kind."""
    reason = backend.refusal(device, dtype, CHECKED_HEADS[2] + 1)
    if reason is not None:
        return BackendCheck(backend.name, False, None, reason)
    error = 0.0
    try:
        for has_presence in (False, True):
            found = _attended_with_gradients(backend, device, dtype, has_presence)
            expected = _attended_with_gradients(PYTORCH, device, torch.float32, has_presence)
            for one, other in zip(found, expected, strict=True):
                error = max(error, float((one - other).abs().max() / other.abs().max()))
    except Exception as failure:  # whatever a kernel that is not ours raises
        return BackendCheck(backend.name, True, None, " ".join(f"{type(failure).__name__}: {failure}".split()))
    return BackendCheck(backend.name, True, error, None)


def _attended_with_gradients(backend: Backend, device: str, dtype: torch.dtype, has_presence: bool) -> list[Tensor]:
    """Attention of seeded rows that bfloat16 holds exactly, and its gradients, in float32."""
    generator = torch.Generator().manual_seed(0)
    num_rows, (num_heads, num_groups, size) = sum(CHECKED_LENGTHS), CHECKED_HEADS
    shapes = [(num_rows, heads, size) for heads in (num_heads, num_groups, num_groups, num_heads)]
    drawn = [torch.randn(shape, generator=generator).bfloat16().to(device, dtype) for shape in shapes]
    query, key, value = inputs = [part.requires_grad_() for part in drawn[:3]]
    presence = torch.ones(num_rows, device=device, requires_grad=True) if has_presence else None
    attended = packed_attention(query, key, value, packed_starts(CHECKED_LENGTHS), presence, backend)
    learnt = inputs if presence is None else [*inputs, presence]
    gradients = torch.autograd.grad(attended, learnt, drawn[3])
    return [part.detach().float() for part in (attended, *gradients)]
