"""Attention of packed rows against padded rows, against its formula, and the other back ends where they can run."""

import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_hidrop.lab.train import packed_attention as module
from vllm_hidrop.lab.train.packed_attention import (
    BACKENDS,
    PYTORCH,
    Backend,
    checked,
    checked_backends,
    choose_backend,
    packed_attention,
)
from vllm_hidrop.lab.train.rows import packed_starts

CPU, CUDA = "cpu", "cuda"
FLASH_ATTN, XFORMERS, _ = BACKENDS
SHAPES = [((5, 1, 9), (4, 4, 8)), ((1,), (2, 1, 16)), ((1, 1, 1), (6, 2, 8)), ((33, 0, 2, 17), (8, 2, 12))]
"""Rows of the samples; query heads, key/value heads, head size."""


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], presence: Tensor | None
) -> Tensor:
    """The reference: samples side by side, padded at the right, one softmax over an explicit mask. [N, H, D]"""
    groups = query.shape[1] // key.shape[1]
    pad = partial(pad_sequence, batch_first=True)
    queries, keys, values = (pad(part.split(lengths)).transpose(1, 2) for part in (query, key, value))
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    logits = queries @ keys.transpose(2, 3) * query.shape[2] ** -0.5
    if presence is not None:
        logits = logits + pad(presence.log().split(lengths))[:, None, None]
    is_hidden = torch.ones(max(lengths), max(lengths), dtype=torch.bool).triu(1)
    attended = logits.masked_fill(is_hidden, float("-inf")).softmax(-1) @ values
    return torch.cat([sample[:, :length] for sample, length in zip(attended, lengths, strict=True)], 1).transpose(0, 1)


def drawn(lengths: tuple[int, ...], heads: tuple[int, int, int], seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and presence, all to be learnt, and weights of the result."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, (num_heads, num_groups, size) = sum(lengths), heads
    query, key, value, weights = (
        torch.randn(num_rows, count, size, generator=generator)
        for count in (num_heads, num_groups, num_groups, num_heads)
    )
    presence = torch.rand(num_rows, generator=generator) + 0.1
    return [part.requires_grad_() for part in (query, key, value, presence)], weights


def check_against_padded(lengths: tuple[int, ...], heads: tuple[int, int, int], has_presence: bool, seed: int) -> None:
    learnt, weights = drawn(lengths, heads, seed)
    learnt = learnt if has_presence else learnt[:3]
    query, key, value = learnt[:3]
    presence = learnt[3] if has_presence else None
    found = packed_attention(query, key, value, packed_starts(lengths), presence)
    expected = padded_attention(query, key, value, lengths, presence)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    gradients = zip(*(torch.autograd.grad(one, learnt, weights) for one in (found, expected)), strict=True)
    for one, other in gradients:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_presence", [False, True])
@pytest.mark.parametrize(("lengths", "heads"), SHAPES)
def test_packed_rows_attend_as_padded_ones_do(
    lengths: tuple[int, ...], heads: tuple[int, int, int], has_presence: bool
) -> None:
    check_against_padded(lengths, heads, has_presence, 1)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    st.sampled_from([(1, 1, 2), (4, 2, 6), (6, 1, 8)]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_packing_attends_as_padded_rows_do(
    lengths: list[int], heads: tuple[int, int, int], has_presence: bool, seed: int
) -> None:
    check_against_padded(tuple(lengths), heads, has_presence, seed)


def test_presence_of_one_changes_nothing() -> None:
    (query, key, value, _), _ = drawn((4, 7), (4, 2, 8))
    row_starts = packed_starts((4, 7))
    plain = packed_attention(query, key, value, row_starts)
    torch.testing.assert_close(packed_attention(query, key, value, row_starts, torch.ones(11)), plain)


def test_the_result_has_the_type_of_the_values() -> None:
    (query, key, value, presence), _ = drawn((4, 7), (4, 2, 8))
    half = value.detach().bfloat16()
    for given_presence in (None, presence):
        assert packed_attention(query, key, half, packed_starts((4, 7)), given_presence).dtype is torch.bfloat16


# --- Which back end ----------------------------------------------------------------------------


def test_without_a_cuda_device_pytorch_attends() -> None:
    assert choose_backend("auto", CPU, torch.bfloat16, 128) is PYTORCH
    assert choose_backend("pytorch", CPU, torch.float32, 128) is PYTORCH


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "import_module", lambda name: name)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "expected"),
    [
        (CUDA, torch.bfloat16, 129, FLASH_ATTN),
        (CUDA, torch.float16, 256, FLASH_ATTN),
        (CUDA, torch.bfloat16, 257, XFORMERS),
        (CUDA, torch.float32, 64, XFORMERS),
        (CUDA, torch.float64, 64, PYTORCH),
        (CPU, torch.bfloat16, 64, PYTORCH),
    ],
)
def test_the_first_back_end_that_takes_the_tensors_is_chosen(
    device: str, dtype: torch.dtype, head_size: int, expected: Backend
) -> None:
    assert choose_backend("auto", device, dtype, head_size) is expected


@pytest.mark.usefixtures("everything_installed")
def test_a_named_back_end_is_used_or_refused_with_the_reason() -> None:
    assert choose_backend("xformers", CUDA, torch.bfloat16, 64) is XFORMERS
    for name, device, dtype, size, reason in (
        ("flash-attn", CPU, torch.bfloat16, 64, "runs on CUDA devices only, not on cpu"),
        ("flash-attn", CUDA, torch.float32, 64, "takes float16, bfloat16, not float32"),
        ("flash-attn", CUDA, torch.float16, 257, "takes heads of at most 256, not 257"),
        ("xformers", CUDA, torch.float64, 64, "takes float16, bfloat16, float32, not float64"),
    ):
        with pytest.raises(ValueError, match=f"attention: {name} {reason}"):
            choose_backend(name, device, dtype, size)


def test_a_back_end_that_is_absent_or_broken_is_refused_by_name_and_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: made for another PyTorch")

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "flash_attn" else name)
    monkeypatch.setattr(module, "import_module", broken)
    assert choose_backend("auto", CUDA, torch.bfloat16, 64) is PYTORCH
    with pytest.raises(ValueError, match=r'flash-attn is not installed: pip install "vllm-hidrop\[flash-attn\]"'):
        choose_backend("flash-attn", CUDA, torch.bfloat16, 64)
    with pytest.raises(ValueError, match="xformers cannot be imported: undefined symbol"):
        choose_backend("xformers", CUDA, torch.bfloat16, 64)


# --- The other back ends -------------------------------------------------------------------------


def test_the_check_gives_every_back_end_an_error_or_a_reason() -> None:
    found = {check.name: check for check in checked_backends()}
    assert list(found) == ["flash-attn", "xformers", "pytorch"]
    assert found["pytorch"].is_usable
    for check in found.values():
        assert (check.max_error is None) is not check.is_usable
        assert (check.reason is None) is check.is_usable
        if check.max_error is not None:
            assert check.max_error < 0.02  # bfloat16 on a CUDA device


def test_the_check_finds_a_wrong_result_and_a_kernel_that_fails() -> None:
    def acausal(query: Tensor, key: Tensor, value: Tensor, row_starts: Tensor, scale: float) -> Tensor:
        return PYTORCH.attend(query.flip(0), key.flip(0), value.flip(0), row_starts, scale).flip(0)

    def failing(*arguments: object) -> Tensor:
        raise NotImplementedError("No operator found\nfor these inputs")

    error = checked(Backend("acausal", acausal), "cpu", torch.float32).max_error
    assert error is not None
    assert error > 0.5
    found = checked(Backend("failing", failing), "cpu", torch.float32)
    assert found == ("failing", True, None, "NotImplementedError: No operator found for these inputs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS[:2], ids=lambda backend: backend.name)
def test_a_kernel_attends_as_pytorch_does(backend: Backend) -> None:
    check = next(check for check in checked_backends() if check.name == backend.name)
    if not check.is_usable:
        pytest.skip(f"{backend.name} {check.reason}")
    assert check.max_error is not None
    assert check.max_error < 0.02


@pytest.mark.skipif(find_spec("xformers") is None, reason="xformers is not installed (extra xformers)")
@pytest.mark.filterwarnings("ignore")  # xformers warns at import
@pytest.mark.parametrize("has_presence", [False, True])
def test_the_inputs_and_the_mask_for_xformers_mean_what_pytorch_computes(
    monkeypatch: pytest.MonkeyPatch, has_presence: bool
) -> None:
    """With the formula from its documentation in place of its kernels, which run on CUDA devices only."""
    from xformers.ops import fmha

    def documented(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, scale: float) -> Tensor:
        assert query.shape == key.shape == value.shape
        assert query.shape[3] % 8 == 0
        mask = attn_bias.materialize((query.shape[1], key.shape[1]))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)

    monkeypatch.setattr(fmha, "memory_efficient_attention", documented)
    (query, key, value, presence), _ = drawn((1, 30, 0, 17), (8, 2, 12))
    arguments = query, key, value, packed_starts((1, 30, 0, 17)), presence if has_presence else None
    torch.testing.assert_close(packed_attention(*arguments, XFORMERS), packed_attention(*arguments))


@pytest.mark.parametrize("has_presence", [False, True])
def test_the_call_of_flash_attn_means_what_pytorch_computes(
    monkeypatch: pytest.MonkeyPatch, has_presence: bool
) -> None:
    """With a stand-in for its kernel: no CPU runs it, and it has never run here."""

    def documented(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        assert causal
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == 30
        scaled = q * (softmax_scale * q.shape[2] ** 0.5)
        lengths = tuple(cu_seqlens_q.diff().tolist())
        return padded_attention(scaled, k, v, lengths, None)

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", documented, raising=False)
    (query, key, value, presence), _ = drawn((1, 30, 0, 17), (8, 2, 12))
    arguments = query, key, value, packed_starts((1, 30, 0, 17)), presence if has_presence else None
    torch.testing.assert_close(packed_attention(*arguments, FLASH_ATTN), packed_attention(*arguments))
