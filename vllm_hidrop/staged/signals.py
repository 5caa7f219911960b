"""Signals computed beside the paged attention: one query row per request, never an S x S matrix.

Float32 statistics whatever the model's dtype. To add a signal: one entry in ``plan.signal``, one function here and its
row in :data:`SIGNALS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vllm_hidrop.methods.scoring import Contribution, RowAttention, Statistic, TextAttention
from vllm_hidrop.plan.places import StagePlaces
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.staged.tensor_parallel import mean_over_ranks, sum_over_ranks

AcrossRanks = Callable[[torch.Tensor], torch.Tensor]
"""Combines a statistic of one rank's heads with those of the other ranks' heads."""

MAX_WEIGHTS = 1 << 22
"""Attention weights computed at a time, all heads together: 16 MiB in float32."""
NOTHING_LEFT = 1e-5
"""Share of ||o||^2 below which o - c is zero in float32: the token is all of the output, and the cosine counts as 0."""


def one_rank(statistic: torch.Tensor) -> torch.Tensor:
    """The statistic itself: all heads are here."""
    return statistic


def row_attention(
    query: torch.Tensor, key: torch.Tensor, num_heads: int, num_kv_heads: int, scale: float
) -> torch.Tensor:
    """Attention of one row to a run of rows that ends with it.

    Args:
        query: [H * D], the row's query after RoPE.
        key: [T, G * D], keys after RoPE of all rows the query may see; G KV heads.
        num_heads: H.
        num_kv_heads: G, divides H.
        scale: of the logits.

    Returns:
        float32 [T], softmax over all T rows per head, then mean over heads (HiDrop section 3.3).
    """
    head_size = query.shape[-1] // num_heads
    grouped_query = query.float().view(num_kv_heads, num_heads // num_kv_heads, head_size)
    grouped_key = key.float().view(-1, num_kv_heads, head_size)
    logits = torch.einsum("ghd,tgd->ght", grouped_query, grouped_key) * scale
    return logits.softmax(dim=-1).mean(dim=(0, 1))


def contribution(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    sum_over_ranks: AcrossRanks = one_rank,
) -> Contribution:
    """What each of a run of rows adds to the attention output o of the row that ends it.

    Never a [T, H * D] tensor: with weights a, ||c_j||^2 = sum_h a_hj^2 ||v_hj||^2 and <c_j, o> = sum_h a_hj <v_hj, o_h>
    give both statistics (VisiPruner equations 6 to 8).

    Args:
        query: [H * D], the last row's query after RoPE.
        key: [T, G * D], keys after RoPE of all rows the query may see; G KV heads.
        value: [T, G * D].
        num_heads: H.
        num_kv_heads: G, divides H.
        scale: of the logits.
        sum_over_ranks: where these heads are only one rank's.

    Returns:
        Statistics of all T rows.
    """
    shape = (-1, num_kv_heads, query.shape[-1] // num_heads)
    queries = (query.float() * scale).view(num_kv_heads, num_heads // num_kv_heads, shape[-1])
    keys, values = (rows.float().view(shape).transpose(0, 1) for rows in (key, value))
    weights = (queries @ keys.transpose(1, 2)).softmax(dim=-1)  # [G, H / G, T]
    output = weights @ values
    along = (weights * (output @ values.transpose(1, 2))).sum((0, 1))
    squared = (weights.square().sum(1) * values.square().sum(-1)).sum(0)
    whole = output.square().sum()
    along, squared, whole = sum_over_ranks(torch.stack((along, squared, whole.expand_as(along))))
    left = whole - 2 * along + squared
    cosine = ((whole - along) * (whole * left).rsqrt()).masked_fill_(left < NOTHING_LEFT * whole, 0)
    return Contribution(squared.sqrt(), cosine)


def text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    mean_over_ranks: AcrossRanks = one_rank,
) -> TextAttention:
    """Sum and maximum over some rows of the attention they pay, head mean first; at most ``MAX_WEIGHTS`` at a time.

    Args:
        query: [N, H * D], queries after RoPE of the rows that look.
        key: [T, G * D], keys after RoPE of the prompt.
        rows: int64 [N] on the host, the rows' places among the T, ascending: each sees itself and what is before.
        num_heads: H.
        num_kv_heads: G, divides H.
        scale: of the logits.
        mean_over_ranks: where these heads are only one rank's; called once per tile, as a maximum over rows is of the
            mean over heads.

    Returns:
        Statistics of all T rows (MustDrop section 3.2).
    """
    num_keys = key.shape[0]
    if not len(rows):
        return TextAttention(*torch.zeros(2, num_keys, device=key.device))
    head_size = query.shape[-1] // num_heads
    keys = key.float().view(num_keys, num_kv_heads, 1, head_size).permute(1, 2, 3, 0)
    places = torch.arange(num_keys)
    tile = max(1, MAX_WEIGHTS // (num_heads * num_keys))
    totals, peaks = [], []
    for start in range(0, len(rows), tile):
        here = rows[start : start + tile]
        seen = int(here[0])  # by all of them
        ahead = (places[seen:] > here[:, None]).to(key.device, non_blocking=True)
        queries = (query[start : start + tile].float() * scale).view(len(here), num_kv_heads, -1, head_size)
        logits = torch.matmul(queries.permute(1, 2, 0, 3), keys)  # [G, H / G, n, T]
        logits[..., seen:].masked_fill_(ahead, -torch.inf)
        paid = mean_over_ranks(logits.softmax(dim=-1).mean(dim=(0, 1)))
        totals.append(paid.sum(0))
        peaks.append(paid.amax(0))
    if len(totals) == 1:
        return TextAttention(totals[0], peaks[0])
    return TextAttention(torch.stack(totals).sum(0), torch.stack(peaks).amax(0))


@dataclass(frozen=True)
class PromptAttention:
    """One prompt in the attention of one layer, as signals read it; H query heads of size D, G key heads.

    Attributes:
        query: [N, H * D], after RoPE, of the prompt's rows in this step; the last is its last row.
        key: [T, G * D], after RoPE, of all its tokens in the stage: those that were cached before the step come first.
        value: [N, G * D], of the rows in this step.
        places: of the prompt's tokens in the stage.
        num_prompt_tokens: of the full prompt.
        shape: (H, G, scale of the logits).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    places: StagePlaces
    num_prompt_tokens: int
    shape: tuple[int, int, float]


def _row_attention(prompt: PromptAttention) -> RowAttention:
    return RowAttention(mean_over_ranks(row_attention(prompt.query[-1], prompt.key, *prompt.shape)))


def _contribution(prompt: PromptAttention) -> Contribution:
    return contribution(prompt.query[-1], prompt.key, prompt.value, *prompt.shape, sum_over_ranks)


def _text_attention(prompt: PromptAttention) -> TextAttention:
    assert len(prompt.query) == len(prompt.key), "the queries of all text rows are needed, none is cached"
    rows = torch.from_numpy(prompt.places.text_behind_first_image(prompt.num_prompt_tokens))
    return text_attention(prompt.query[rows.to(prompt.query.device)], prompt.key, rows, *prompt.shape, mean_over_ranks)


SIGNALS: Mapping[Signal, Callable[[PromptAttention], Statistic]] = {
    Signal.NEXT_ATTENTION: _row_attention,
    Signal.PREVIOUS_ATTENTION: _row_attention,
    Signal.CONTRIBUTION: _contribution,
    Signal.TEXT_ATTENTION: _text_attention,
}
"""What each signal comes to for all T tokens of a prompt in a stage."""
