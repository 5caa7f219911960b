"""Starting weights of the language model that let it look things up before it has learnt anything.

From random weights the answers stay at their prior. Here every text embedding shares one direction ``u``; *local* heads
use it to gather the words just before, *matching* heads to ignore text and find the vision token of the same words.
"""

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

EMBEDDING_STD = 0.1
SHARED_FRACTION = 0.5
"""Length of the shared direction relative to that of a word's own part."""
LOCAL_GAIN = 0.7
MATCH_GAIN = 1.3
TEXT_REPULSION = 1.35
LOCAL_COPY_GAIN = 0.12
MATCH_COPY_GAIN = 0.25
LOCAL_FREQUENCIES = ((0, 1), (1, 2), (2, 3), (1, 2, 3))
"""RoPE frequencies (0 is the fastest) that a head's locality is made of, per head."""


def shared_direction(hidden_size: int) -> Tensor:
    """The unit vector [hidden_size] that all text embeddings share."""
    direction: Tensor = torch.full((hidden_size,), hidden_size**-0.5)
    return direction


def shared_part(hidden_size: int) -> Tensor:
    """The part of every text embedding along the shared direction, [hidden_size]."""
    length = EMBEDDING_STD * hidden_size**0.5 * SHARED_FRACTION
    part: Tensor = shared_direction(hidden_size) * length
    return part


def _local_head(size: int, direction: Tensor, frequencies: tuple[int, ...]) -> Tensor:
    """Query and key rows [size, hidden] whose match falls with distance."""
    rows = torch.zeros(size, len(direction))
    for frequency in frequencies:
        rows[frequency] = direction * LOCAL_GAIN * (4 / len(frequencies)) ** 0.5
    return rows


def _matching_head(size: int, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key rows [size, hidden]: equal words attract, text repels text."""
    rows = nn.init.orthogonal_(torch.empty(size, len(direction))) * MATCH_GAIN
    rows = rows - (rows @ direction)[:, None] * direction
    slowest = size // 2 - 1
    query, key = rows.clone(), rows.clone()
    query[slowest] = direction * TEXT_REPULSION
    key[slowest] = -direction * TEXT_REPULSION
    return query, key


def _initialise_layer(layer: LlamaDecoderLayer, num_local_heads: int) -> None:
    attention = layer.self_attn
    size = attention.head_dim
    hidden_size = attention.o_proj.weight.shape[0]
    direction = shared_direction(hidden_size)
    copied = nn.init.orthogonal_(torch.empty(hidden_size, hidden_size))
    attention.v_proj.weight.copy_(copied)
    for head, frequencies in enumerate(LOCAL_FREQUENCIES):
        rows = slice(head * size, (head + 1) * size)
        is_local = head >= len(LOCAL_FREQUENCIES) - num_local_heads
        if is_local:
            query = key = _local_head(size, direction, frequencies)
        else:
            query, key = _matching_head(size, direction)
        gain = LOCAL_COPY_GAIN if is_local else MATCH_COPY_GAIN
        attention.q_proj.weight[rows] = query
        attention.k_proj.weight[rows] = key
        attention.o_proj.weight[:, rows] = copied[rows].T * gain
    layer.mlp.gate_proj.weight.normal_(0, 0.05)
    layer.mlp.up_proj.weight.normal_(0, 0.05)
    layer.mlp.down_proj.weight.normal_(0, 0.01)


@torch.no_grad()
def initialise_language_model(model: LlavaForConditionalGeneration, first_reading_layer: int) -> None:
    """Set the weights in place: layers below ``first_reading_layer`` get local heads only, deeper layers get one."""
    llm = model.model.language_model
    table = llm.embed_tokens.weight
    table.normal_(0, EMBEDDING_STD)
    direction = shared_direction(table.shape[1])
    table -= (table @ direction)[:, None] * direction
    model.lm_head.weight.copy_(table)
    table += shared_part(table.shape[1])
    for index, layer in enumerate(llm.layers):
        _initialise_layer(layer, 4 if index < first_reading_layer else 1)
