"""Signals of adaptive methods against their explicit definitions, in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vllm_hidrop.plan.places import Span, StagePlaces
from vllm_hidrop.plan.signal import Signal, Under
from vllm_hidrop.staged import signals
from vllm_hidrop.staged.signals import contribution, row_attention, text_attention

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

SIZE = 8
SCALE = 0.4
heads = st.sampled_from([(4, 4), (4, 2), (6, 1), (1, 1)])
"""Query heads, KV heads."""


def random_rows(num_rows: int, num_heads: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, num_heads * SIZE, generator=torch.Generator().manual_seed(seed))


def per_head(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """float64 [T, H, D], KV heads repeated."""
    own = rows.double().view(len(rows), -1, SIZE)
    return own.repeat_interleave(num_heads // own.shape[1], dim=1)


def weights_of(query: torch.Tensor, key: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[N, H, T], softmax over all keys."""
    logits = torch.einsum("nhd,thd->nht", per_head(query, num_heads), per_head(key, num_heads)) * SCALE
    return logits.softmax(dim=-1)


@given(heads, st.integers(2, 20), st.integers(0, 99))
def test_contribution_is_that_of_the_explicit_vectors(shape: tuple[int, int], num_rows: int, seed: int) -> None:
    num_heads, num_kv_heads = shape
    query = random_rows(1, num_heads, seed)
    key, value = (random_rows(num_rows, num_kv_heads, seed + n) for n in (1, 2))
    weights = weights_of(query, key, num_heads)[0]
    shares = torch.einsum("ht,thd->thd", weights, per_head(value, num_heads)).flatten(1)
    output = shares.sum(0)
    found = contribution(query[0], key, value, *shape, SCALE)
    torch.testing.assert_close(found.norm.double(), shares.norm(dim=1), atol=1e-6, rtol=1e-5)
    rest = cosine_similarity(output - shares, output[None])
    torch.testing.assert_close(found.cosine.double(), rest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contribution_is_float32_as_if_its_inputs_were(dtype: torch.dtype) -> None:
    query, key, value = (
        random_rows(1, 4, 0)[0].to(dtype),
        random_rows(9, 2, 1).to(dtype),
        random_rows(9, 2, 2).to(dtype),
    )
    found = contribution(query, key, value, 4, 2, SCALE)
    exact = contribution(query.float(), key.float(), value.float(), 4, 2, SCALE)
    assert all(part.dtype == torch.float32 and part.shape == (9,) for part in found)
    assert all(torch.equal(part, other) for part, other in zip(found, exact, strict=True))


def test_values_of_zero_have_no_cosine() -> None:
    found = contribution(random_rows(1, 4, 0)[0], random_rows(5, 2, 1), torch.zeros(5, 2 * SIZE), 4, 2, SCALE)
    assert found.norm.eq(0).all()
    assert found.cosine.isnan().all()


def test_a_token_that_adds_nothing_changes_nothing() -> None:
    value = random_rows(5, 2, 2)
    value[3] = 0
    found = contribution(random_rows(1, 4, 0)[0], random_rows(5, 2, 1), value, 4, 2, SCALE)
    assert found.norm[3] == 0
    torch.testing.assert_close(found.cosine[3], torch.tensor(1.0))


@st.composite
def lookers(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Rows of a prompt, and which of them look, ascending."""
    num_rows = draw(st.integers(1, 20))
    return num_rows, sorted(draw(st.sets(st.integers(0, num_rows - 1), min_size=1)))


def expected_attention(query: torch.Tensor, key: torch.Tensor, rows: list[int], num_heads: int) -> torch.Tensor:
    """float64 [N, T], head mean of every row's attention to itself and what is before."""
    paid = torch.zeros(len(rows), len(key), dtype=torch.float64)
    for n, row in enumerate(rows):
        paid[n, : row + 1] = weights_of(query[n : n + 1], key[: row + 1], num_heads)[0].mean(0)
    return paid


@given(heads, lookers(), st.integers(0, 99), st.sampled_from([1, 50, 1 << 22]))
def test_text_attention_is_that_of_the_explicit_block(
    shape: tuple[int, int], prompt: tuple[int, list[int]], seed: int, max_weights: int
) -> None:
    num_heads, num_kv_heads = shape
    num_rows, rows = prompt
    query, key = random_rows(len(rows), num_heads, seed), random_rows(num_rows, num_kv_heads, seed + 1)
    paid = expected_attention(query, key, rows, num_heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "MAX_WEIGHTS", max_weights)
        found = text_attention(query, key, torch.tensor(rows), *shape, SCALE)
    torch.testing.assert_close(found.total.double(), paid.sum(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.peak.double(), paid.amax(0), atol=1e-6, rtol=0)


def test_text_attention_never_holds_more_weights_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(4, 12)
    query, key = random_rows(8, 4, 0), random_rows(12, 2, 1)
    whole = text_attention(query, key, rows, 4, 2, SCALE)
    sizes = []
    matmul = torch.matmul

    def measured(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = matmul(left, right)
        sizes.append(product.numel())
        return product

    monkeypatch.setattr(signals, "MAX_WEIGHTS", 3 * 4 * 12)
    monkeypatch.setattr(torch, "matmul", measured)
    tiled = text_attention(query, key, rows, 4, 2, SCALE)
    assert sizes == [3 * 4 * 12, 3 * 4 * 12, 2 * 4 * 12]
    torch.testing.assert_close(tiled, whole)


def test_text_attention_is_float32_as_if_its_inputs_were() -> None:
    query, key, rows = random_rows(3, 4, 0).bfloat16(), random_rows(9, 2, 1).bfloat16(), torch.tensor([2, 5, 8])
    found = text_attention(query, key, rows, 4, 2, SCALE)
    exact = text_attention(query.float(), key.float(), rows, 4, 2, SCALE)
    assert all(part.dtype == torch.float32 and part.shape == (9,) for part in found)
    assert all(torch.equal(part, other) for part, other in zip(found, exact, strict=True))


def test_each_row_pays_one_in_all_and_nothing_ahead() -> None:
    for last in (2, 5, 8):
        found = text_attention(random_rows(1, 4, last), random_rows(9, 2, 1), torch.tensor([last]), 4, 2, SCALE)
        assert torch.equal(found.total, found.peak)
        assert found.total[last + 1 :].eq(0).all()
        torch.testing.assert_close(found.total.sum(), torch.tensor(1.0))


def test_no_row_pays_nothing() -> None:
    found = text_attention(torch.empty(0, 4 * SIZE), random_rows(9, 2, 1), torch.arange(0), 4, 2, SCALE)
    assert not any(part.any() for part in found)


def test_a_common_factor_of_the_values_scales_norms_alone() -> None:
    query, key, value = random_rows(1, 4, 0)[0], random_rows(9, 2, 1), random_rows(9, 2, 2)
    found = [contribution(query, key, factor * value, 4, 2, SCALE) for factor in (1, 4)]
    for one, other in pairwise(found):
        torch.testing.assert_close(other.norm, 4 * one.norm)
        torch.testing.assert_close(other.cosine, one.cosine)


@pytest.mark.parametrize("seed", range(6))
def test_a_token_that_is_all_of_the_output_has_cosine_zero(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(size, generator=generator) for size in ((128,), (1, 64), (1, 64)))
    assert contribution(query, key, value, 4, 2, 0.1).cosine.tolist() == [0.0]


@pytest.mark.parametrize("shape", [(4, 4), (4, 2), (6, 2)])
def test_statistics_of_heads_split_over_ranks_combine_to_those_of_all(shape: tuple[int, int]) -> None:
    num_heads, num_kv_heads = shape
    query, key, value = (random_rows(9, heads, seed) for seed, heads in enumerate((num_heads, *[num_kv_heads] * 2)))
    text = torch.tensor([5, 7, 8])
    own = num_heads // 2, num_kv_heads // 2, SCALE
    ranks = list(zip(*(part.chunk(2, dim=1) for part in (query, key, value)), strict=True))
    shares: list[torch.Tensor] = []

    def told(share: torch.Tensor) -> torch.Tensor:
        shares.append(share)
        return share

    for each in ranks:
        contribution(each[0][-1], each[1], each[2], *own, told)
    total = torch.stack(shares).sum(0)
    everywhere = contribution(ranks[0][0][-1], ranks[0][1], ranks[0][2], *own, lambda _: total)
    torch.testing.assert_close(everywhere, contribution(query[-1], key, value, *shape, SCALE))

    shares.clear()
    for each in ranks:
        text_attention(each[0][text], each[1], text, *own, told)
    mean = torch.stack(shares).mean(0)
    everywhere_text = text_attention(ranks[0][0][text], ranks[0][1], text, *own, lambda _: mean)
    torch.testing.assert_close(everywhere_text, text_attention(query[text], key, text, *shape, SCALE))


def test_every_signal_under_a_layer_is_computed() -> None:
    assert set(signals.SIGNALS) == {signal for signal in Signal if signal.under is not Under.NO_LAYER}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 200))
def test_prompts_padded_together_never_exceed_the_bound(lengths: list[int], most: int) -> None:
    groups = signals._alike(lengths, most)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most for group in groups)
    if len(lengths) * max(lengths) <= most:
        assert len(groups) == 1


@pytest.mark.parametrize("most", [1 << 25, 26 * 16])  # all together; the two short ones, then the long one
@pytest.mark.parametrize("cached", [(0, 0, 0), (0, 5, 2)])
def test_prompts_together_attend_as_each_alone(
    cached: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several prompts of unequal lengths among a stage's rows, a decoding request between them."""
    monkeypatch.setattr(signals, "MAX_KEYS", most)
    monkeypatch.setattr(signals, "mean_over_ranks", lambda part: part)
    stage = random_rows(30, 4, 0), random_rows(30, 2, 1), random_rows(30, 2, 2)
    rows = slice(0, 9), slice(10, 13), slice(13, 30)
    prompts = [
        signals.PromptAttention(
            *stage,
            own,
            random_rows(num, 2, num) if num else None,
            StagePlaces((Span(1, 2),), (2,)),
            own.stop - own.start + num,
            (4, 2, SCALE),
        )
        for own, num in zip(rows, cached, strict=True)
    ]
    together = signals.SIGNALS[Signal.NEXT_ATTENTION](prompts)
    for prompt, (weight,) in zip(prompts, together, strict=True):
        torch.testing.assert_close(weight, row_attention(prompt.query[-1], prompt.key, *prompt.shape))
        ((alone,),) = signals.SIGNALS[Signal.NEXT_ATTENTION]([prompt])
        assert torch.equal(alone, row_attention(prompt.query[-1], prompt.key, *prompt.shape))
