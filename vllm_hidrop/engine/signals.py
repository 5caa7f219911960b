"""Signals computed beside the paged attention: one query row per request, never an S x S matrix.

Float32 statistics whatever the model's dtype. To add a signal: one function here and one name in ``scoring.Signal``.
"""

import torch


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
