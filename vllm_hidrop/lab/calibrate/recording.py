"""Records one forward pass layer by layer, and runs its deeper layers again without vision.

Per layer it keeps a few numbers, one attention row and the states of text rows, never the N x N attention. Axes: N
rows, T text rows, I instruction rows, V vision rows, H heads, D head size, C hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vllm_hidrop.lab.calibrate.checkpoint import Rows


class Recording:
    """What one pass over [prompt, answer] showed; every list has one entry per layer.

    Attributes:
        vision_intra, text_intra: mean cosine between a layer's input and output, over the prompt's rows of a kind.
        instruction: a layer's output on the rows behind the image, [I, C].
        attention: what the last prompt row pays to vision, softmax over the prompt, [H, V] float32.
        text_inputs: a layer's input on all text rows, [T, C]; ``text_kwargs`` its other arguments for these rows.
        last_states: the last layer's output on all text rows, [T, C].
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.vision_intra: list[float] = []
        self.text_intra: list[float] = []
        self.instruction: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.text_inputs: list[Tensor] = []
        self.text_kwargs: list[dict[str, Any]] = []
        self.last_states = torch.empty(0)

    def on_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a layer's attention."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.attention.append(last_row_attention(attention, hidden[0], kwargs["position_embeddings"], self.rows))

    def on_layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook of a decoder layer."""
        before, after = args[0][0], output[0]
        self.vision_intra.append(_mean_cosine(before, after, self.rows.vision))
        self.text_intra.append(_mean_cosine(before, after, self.rows.prompt_text))
        self.instruction.append(after[self.rows.instruction])
        text = self.rows.text
        self.text_inputs.append(before[text])
        self.text_kwargs.append({key: _take_rows(key, value, text) for key, value in kwargs.items()})
        self.last_states = after[text]


@contextmanager
def recorded(layers: nn.ModuleList, rows: Rows) -> Iterator[Recording]:
    """Yields a recording that forward passes within this context fill."""
    recording = Recording(rows)
    handles = [layer.register_forward_hook(recording.on_layer, with_kwargs=True) for layer in layers]
    for layer in layers:
        attention: Any = layer.self_attn
        handles.append(attention.register_forward_pre_hook(recording.on_attention, with_kwargs=True))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_row_attention(attention: Any, normed: Tensor, rotary: tuple[Tensor, Tensor], rows: Rows) -> Tensor:
    """Attention of the last prompt row to the vision rows, softmax over the prompt's rows, [H, V] float32.

    ``attention`` is a layer's, with ``q_proj``, ``k_proj``, ``head_dim`` and ``scaling``; ``normed`` [N, C] its input.
    ``rotary`` is cosine and sine of every row, [1, N, D]; M-RoPE's are already merged over its axes.
    """
    prompt = slice(0, rows.num_prompt)
    cos, sin = (part[0, prompt] for part in rotary)
    last = rows.last_prompt
    query = attention.q_proj(normed[last]).unflatten(-1, (-1, attention.head_dim))
    key = attention.k_proj(normed[prompt]).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
    query, key = _rotated(query, cos[last], sin[last]), _rotated(key, cos, sin)
    grouped = query.float().unflatten(0, (len(key), -1))  # [KV heads, queries of each, D]
    logits = torch.einsum("kgd,knd->kgn", grouped, key.float()).flatten(0, 1) * attention.scaling
    return logits.softmax(-1)[:, rows.vision]


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def _mean_cosine(before: Tensor, after: Tensor, rows: Tensor) -> float:
    return float(cosine_similarity(before[rows].float(), after[rows].float(), dim=-1).mean())


def _take_rows(key: str, value: Any, rows: Tensor) -> Any:
    """A layer's argument for some of its rows."""
    if value is None:
        return None
    if key == "position_embeddings":
        return tuple(part[:, rows] for part in value)
    if key == "attention_mask":
        return value[..., rows, :][..., rows]
    return value[..., rows] if key == "position_ids" else value


@torch.no_grad()
def states_without_vision(layers: nn.ModuleList, recording: Recording, first_layer: int) -> Tensor:
    """Last-layer states [T, C] of the text rows when layers from ``first_layer`` (zero-based) on see no vision.

    Text rows keep their positions. Text attends to text only, which equals masking the vision columns for every row
    that is read, and costs T rows instead of N.
    """
    states = recording.text_inputs[first_layer][None]
    run = [partial(layer, **kwargs) for layer, kwargs in zip(layers, recording.text_kwargs, strict=True)]
    for layer in run[first_layer:]:
        states = layer(states)
    return states[0]
