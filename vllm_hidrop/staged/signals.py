"""Signals computed beside the paged attention: of one query row per prompt, or of its text rows tile by tile.

Arguments, the same everywhere: ``query`` has rows of H heads of size D, ``key`` and ``value`` rows of G KV heads, G
divides H; ``query`` and ``key`` are after RoPE; ``scale`` is that of the logits. Statistics are float32 [T] whatever
the model's dtype. To add a signal: one entry in ``plan.signal``, one function here, its row in :data:`SIGNALS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.methods.scoring import Contribution, RowAttention, Statistic, TextAttention
from vllm_hidrop.plan.places import StagePlaces
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.staged.tensor_parallel import mean_over_ranks, sum_over_ranks

AcrossRanks = Callable[[torch.Tensor], torch.Tensor]
"""Combines a statistic of one tensor-parallel rank's heads with those of the other ranks' heads."""

MAX_WEIGHTS = 1 << 22
"""Attention weights computed at a time, all heads together: 16 MiB in float32."""
MAX_KEYS = 1 << 25
"""Elements of padded K of several prompts computed at a time: 128 MiB in float32."""
NOTHING_LEFT = 1e-5
"""Where ||o - c||^2 is a smaller share of ||o||^2, float32 cannot tell it from 0: the token is all of the output, and
the cosine counts as 0."""


def one_rank(statistic: torch.Tensor) -> torch.Tensor:
    """The statistic itself, as this rank has all heads."""
    return statistic


def row_attention(
    query: torch.Tensor, key: torch.Tensor, num_heads: int, num_kv_heads: int, scale: float
) -> torch.Tensor:
    """Attention of one row, ``query`` [H * D], to the rows it sees, ``key`` [T, G * D]: float32 [T].

    Softmax over all T rows per head, then mean over heads (HiDrop section 3.3).
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
    """What each of the T rows that one row sees adds to its attention output o (VisiPruner equations 6 to 8).

    ``query`` is [H * D], ``key`` and ``value`` are [T, G * D]. No c_j itself is computed, which all together would be
    [T, H * D]: with attention weights a, ||c_j||^2 = sum_h a_hj^2 ||v_hj||^2 and <c_j, o> = sum_h a_hj <v_hj, o_h> give
    both statistics.
    """
    shape = (-1, num_kv_heads, query.shape[-1] // num_heads)
    queries = (query.float() * scale).view(num_kv_heads, num_heads // num_kv_heads, shape[-1])
    keys, values = (rows.float().view(shape).transpose(0, 1) for rows in (key, value))
    weights = (queries @ keys.transpose(1, 2)).softmax(dim=-1)  # [G, H / G, T]
    output = weights @ values
    dot = (weights * (output @ values.transpose(1, 2))).sum((0, 1))  # <c_j, o>
    c_squared = (weights.square().sum(1) * values.square().sum(-1)).sum(0)
    o_squared = output.square().sum()
    dot, c_squared, o_squared = sum_over_ranks(torch.stack((dot, c_squared, o_squared.expand_as(dot))))
    rest_squared = o_squared - 2 * dot + c_squared  # ||o - c_j||^2
    cosine = (o_squared - dot) * (o_squared * rest_squared).rsqrt()
    return Contribution(c_squared.sqrt(), cosine.masked_fill_(rest_squared < NOTHING_LEFT * o_squared, 0))


def text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    mean_over_ranks: AcrossRanks = one_rank,
) -> TextAttention:
    """Attention that N text rows, ``query`` [N, H * D], pay to a prompt, ``key`` [T, G * D] (MustDrop section 3.2).

    Mean over heads, then sum and maximum over the N rows; computed in tiles of at most ``MAX_WEIGHTS`` weights.
    ``rows`` are the N rows' places among the T, int64 [N] on the host, ascending: each sees itself and what is before.
    ``mean_over_ranks`` is called once per tile, as the maximum over rows is taken of the mean over all heads.
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
        in_tile = rows[start : start + tile]
        seen_by_all = int(in_tile[0])
        ahead = async_tensor_h2d(places[seen_by_all:] > in_tile[:, None], device=key.device)
        queries = (query[start : start + tile].float() * scale).view(len(in_tile), num_kv_heads, -1, head_size)
        logits = torch.matmul(queries.permute(1, 2, 0, 3), keys)  # [G, H / G, n, T]
        logits[..., seen_by_all:].masked_fill_(ahead, -torch.inf)
        paid = mean_over_ranks(logits.softmax(dim=-1).mean(dim=(0, 1)))
        totals.append(paid.sum(0))
        peaks.append(paid.amax(0))
    if len(totals) == 1:
        return TextAttention(totals[0], peaks[0])
    return TextAttention(torch.stack(totals).sum(0), torch.stack(peaks).amax(0))


@dataclass(frozen=True)
class PromptAttention:
    """One prompt in the attention of one layer, as signals read it.

    Attributes:
        stage_query: [T, H * D], of all rows of the stage, other prompts' included.
        stage_key: [T, G * D], of the same rows.
        stage_value: [T, G * D], of the same rows.
        rows: the prompt's own among them.
        cached_key: [n, G * D], of its tokens that were cached before the step; None where none were.
        places: where the stage holds the prompt's tokens.
        shape: (H, G, scale of the logits).
    """

    stage_query: torch.Tensor
    stage_key: torch.Tensor
    stage_value: torch.Tensor
    rows: slice
    cached_key: torch.Tensor | None
    places: StagePlaces
    num_prompt_tokens: int
    shape: tuple[int, int, float]

    @property
    def query(self) -> torch.Tensor:
        """[N, H * D], of the prompt's rows in this step; the last is its last row."""
        return self.stage_query[self.rows]

    @property
    def key(self) -> torch.Tensor:
        """[T, G * D], of all its tokens in the stage."""
        own = self.stage_key[self.rows]
        return own if self.cached_key is None else torch.cat((self.cached_key, own))

    @property
    def value(self) -> torch.Tensor:
        """[N, G * D], of its rows in this step."""
        return self.stage_value[self.rows]


def _row_attention(prompts: Sequence[PromptAttention]) -> list[RowAttention]:
    lengths = [prompt.places.count(prompt.num_prompt_tokens) for prompt in prompts]
    found: dict[int, RowAttention] = {}
    for together in _alike(lengths, MAX_KEYS // prompts[0].stage_key.shape[1]):
        several = [prompts[index] for index in together]
        if len(several) == 1:
            (prompt,) = several
            weights = row_attention(prompt.query[-1], prompt.key, *prompt.shape)[None]
        else:
            weights = _row_attentions(several, [lengths[index] for index in together])
        for index, weight in zip(together, mean_over_ranks(weights), strict=True):
            found[index] = RowAttention(weight[: lengths[index]])
    return [found[index] for index in range(len(prompts))]


def _alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of prompts to pad to one length together: at most ``most`` rows, padding included, or one prompt alone.

    Shortest first, so that one long prompt does not pad all others to its length.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _row_attentions(prompts: Sequence[PromptAttention], lengths: Sequence[int]) -> torch.Tensor:
    """:func:`row_attention` of several prompts, float32 [P, longest], by as many kernels as for one.

    ``lengths``: tokens that each last row sees, itself included.
    """
    num_heads, num_kv_heads, scale = prompts[0].shape
    query, key = prompts[0].stage_query, prompts[0].stage_key
    cached = [prompt.cached_key for prompt in prompts if prompt.cached_key is not None]
    places = np.arange(max(lengths))
    host = np.zeros((len(prompts), len(places) + 2), dtype=np.int64)  # rows of K, the last row, the length
    num_before = len(key)  # cached keys follow the stage's rows
    for row, prompt, length in zip(host, prompts, lengths, strict=True):
        num_cached = 0 if prompt.cached_key is None else len(prompt.cached_key)
        own = prompt.rows.start + np.arange(length - num_cached)
        row[:length] = np.concatenate((num_before + np.arange(num_cached), own))
        row[-2:] = prompt.rows.stop - 1, length
        num_before += num_cached
    index, last, sees = async_tensor_h2d(host, device=key.device).split((len(places), 1, 1), dim=1)
    keys = (torch.cat((key, *cached)) if cached else key)[index].float().unflatten(2, (num_kv_heads, -1))
    queries = query[last[:, 0]].float().view(len(prompts), num_kv_heads, num_heads // num_kv_heads, -1)
    logits = torch.einsum("pghd,ptgd->pght", queries, keys) * scale
    unseen = torch.arange(len(places), device=key.device) >= sees
    return logits.masked_fill_(unseen[:, None, None], -torch.inf).softmax(dim=-1).mean(dim=(1, 2))


def _contribution(prompts: Sequence[PromptAttention]) -> list[Contribution]:
    return [
        contribution(prompt.query[-1], prompt.key, prompt.value, *prompt.shape, sum_over_ranks) for prompt in prompts
    ]


def _text_attention(prompts: Sequence[PromptAttention]) -> list[TextAttention]:
    found = []
    for prompt in prompts:
        assert prompt.cached_key is None, "the queries of all text rows are needed, none is cached"
        rows = torch.from_numpy(prompt.places.text_behind_first_image(prompt.num_prompt_tokens))
        query = prompt.query[async_tensor_h2d(rows, device=prompt.query.device)]
        found.append(text_attention(query, prompt.key, rows, *prompt.shape, mean_over_ranks))
    return found


SIGNALS: Mapping[Signal, Callable[[Sequence[PromptAttention]], Sequence[Statistic]]] = {
    Signal.NEXT_ATTENTION: _row_attention,
    Signal.PREVIOUS_ATTENTION: _row_attention,
    Signal.CONTRIBUTION: _contribution,
    Signal.TEXT_ATTENTION: _text_attention,
}
"""The function that computes each signal, for all T tokens of every prompt in a stage."""
