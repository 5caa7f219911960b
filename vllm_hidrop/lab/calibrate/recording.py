"""Records one forward pass layer by layer, and runs its deeper layers again on some of its rows.

Per layer it keeps a few numbers, one attention row and the states of some rows, never the N x N attention. Axes: N
rows, T text rows, I instruction rows, V vision rows, H heads, D head size, C hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vllm_hidrop.lab.calibrate.attention import Attend, Heads, hooked
from vllm_hidrop.lab.calibrate.checkpoint import Rows
from vllm_hidrop.methods.scoring import Contribution, select_top


class Recording:
    """What one pass over [prompt, answer] showed; every list has one entry per layer.

    Attributes:
        vision_intra, text_intra: mean cosine between a layer's input and output, over the prompt's rows of a kind.
        instruction: a layer's output on the rows behind the image, [I, C].
        attention: what the last prompt row pays to vision, softmax over the prompt, [H, V] float32.
        contributions: what every vision row adds to the last prompt row's attention output.
        text_inputs: a layer's input on all text rows, [T, C]; ``kwargs`` its other arguments, for all rows.
        cut_rows: all text rows, and the ``num_kept`` vision rows that add most under the layer before; the first layer,
            which has none before it, has all rows.
        cut_inputs: a layer's input on its ``cut_rows``; empty where ``num_kept`` is 0.
        last_states: the last layer's output on all text rows, [T, C].
    """

    def __init__(self, rows: Rows, num_kept: int = 0) -> None:
        self.rows = rows
        self.num_kept = num_kept
        self.vision_intra: list[float] = []
        self.text_intra: list[float] = []
        self.instruction: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.contributions: list[Contribution] = []
        self.text_inputs: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []
        self.cut_rows: list[Tensor] = []
        self.cut_inputs: list[Tensor] = []
        self.last_states = torch.empty(0)

    def on_attention(self, heads: Heads, attend: Attend) -> Tensor:
        """The hook of every layer's attention."""
        weights = last_row_weights(heads, self.rows)
        self.attention.append(weights[:, self.rows.vision])
        self.contributions.append(contribution(weights, heads.value, self.rows))
        return attend(heads.value)

    def on_layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook of a decoder layer."""
        before, after = args[0][0], output[0]
        self.vision_intra.append(_mean_cosine(before, after, self.rows.vision))
        self.text_intra.append(_mean_cosine(before, after, self.rows.prompt_text))
        self.instruction.append(after[self.rows.instruction])
        text = self.rows.text
        self.text_inputs.append(before[text])
        self.kwargs.append(kwargs)
        if self.num_kept:
            self.cut_rows.append(self._rows_after_cut(len(self.cut_rows)))
            self.cut_inputs.append(before[self.cut_rows[-1]])
        self.last_states = after[text]

    def _rows_after_cut(self, layer: int) -> Tensor:
        """The rows that enter ``layer`` where the layer before it decides; ascending."""
        vision = self.rows.vision
        if layer:
            norm = self.contributions[layer - 1].norm
            vision = vision[select_top(norm.nan_to_num(0), min(self.num_kept, len(norm)))]
        return torch.cat([self.rows.text, vision]).sort().values


@contextmanager
def recorded(layers: nn.ModuleList, rows: Rows, num_kept: int = 0) -> Iterator[Recording]:
    """Yields a recording that a forward pass within this context fills."""
    recording = Recording(rows, num_kept)
    handles = [layer.register_forward_hook(recording.on_layer, with_kwargs=True) for layer in layers]
    try:
        with hooked(layers, [recording.on_attention] * len(layers)):
            yield recording
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_row_weights(heads: Heads, rows: Rows) -> Tensor:
    """Attention of the last prompt row to the prompt's rows, [H, rows] float32."""
    query, key = heads.query[:, rows.last_prompt].float(), heads.key[:, : rows.num_prompt].float()
    grouped = query.unflatten(0, (len(key), -1))  # [heads of keys, queries of each, D]
    logits = torch.einsum("kgd,knd->kgn", grouped, key).flatten(0, 1) * heads.scaling
    return logits.softmax(-1)


@torch.no_grad()
def contribution(weights: Tensor, value: Tensor, rows: Rows) -> Contribution:
    """What each vision row adds to the last prompt row's attention output, from its ``weights`` [H, rows]."""
    grouped = weights.unflatten(0, (len(value), -1))
    values = value[:, : rows.num_prompt].float()
    output = torch.einsum("kgn,knd->kgd", grouped, values).flatten()
    parts = torch.einsum("kgv,kvd->vkgd", grouped[..., rows.vision], values[:, rows.vision]).flatten(1)
    return Contribution(parts.norm(dim=1), cosine_similarity(output - parts, output, dim=1))


def _mean_cosine(before: Tensor, after: Tensor, rows: Tensor) -> float:
    return float(cosine_similarity(before[rows].float(), after[rows].float(), dim=-1).mean())


def _take_rows(key: str, value: Any, rows: Tensor) -> Any:
    """A layer's argument for some of its rows."""
    if value is None:
        return None
    if key == "position_embeddings":
        return tuple(part[..., rows, :] for part in value)
    if key == "attention_mask":
        return value[..., rows, :][..., rows]
    return value[..., rows] if key == "position_ids" else value


@torch.no_grad()
def states_without_vision(layers: nn.ModuleList, recording: Recording, first_layer: int) -> Tensor:
    """Last-layer states [T, C] of the text rows when layers from ``first_layer`` (zero-based) on see no vision.

    Text rows keep their positions. Text attends to text only, which equals masking the vision columns for every row
    that is read, and costs T rows instead of N.
    """
    return _run(layers, recording, first_layer, recording.rows.text, recording.text_inputs[first_layer])


@torch.no_grad()
def states_after_cut(layers: nn.ModuleList, recording: Recording, first_layer: int) -> Tensor:
    """The same when layers from ``first_layer`` on see the vision rows that add most under the layer before.

    The last rows are those of the prompt's end and the answer. Deepstack's additions are not made again, so
    ``first_layer`` must not be before them.
    """
    return _run(layers, recording, first_layer, recording.cut_rows[first_layer], recording.cut_inputs[first_layer])


def _run(layers: nn.ModuleList, recording: Recording, first_layer: int, rows: Tensor, states: Tensor) -> Tensor:
    taken: dict[tuple[str, int], Any] = {}  # layers share their arguments
    states = states[None]
    for layer, kwargs in list(zip(layers, recording.kwargs, strict=True))[first_layer:]:
        for key, value in kwargs.items():
            if (key, id(value)) not in taken:
                taken[key, id(value)] = _take_rows(key, value, rows)
        states = layer(states, **{key: taken[key, id(value)] for key, value in kwargs.items()})
    return states[0]
