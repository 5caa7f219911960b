"""The decoder of any Hugging Face vision-language model, its layers called whole on some rows of a prompt.

What stands before the layers (tower, projector, placing of features, position ids, rotary embeddings) is Hugging
Face's own forward: one dense pass over the prompt is recorded, and with it what each layer is given.

Axes: T rows of the recorded prompt (fillers behind it included), N rows of a pass, H query heads, G key/value heads,
D head size, C hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from vllm_hidrop.verify.reference.attention import Heads, additive_mask, attention_weights

ATTENTION = "hidrop_reference"
_PER_ROW = {"position_embeddings": -2, "position_ids": -1}  # what layers are given for each row, and its axis

Given = Mapping[str, Any]
"""What a layer is given for each of its rows: position ids, rotary embeddings."""

Weigh = Callable[[Heads], torch.Tensor]
"""The weights [H, N, N] of a layer's attention from its rotated heads."""


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    weigh: Weigh | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Hugging Face's layers call it on [1, heads, N, D]: causal, or with the weights of ``weigh``."""
    window = options.get("sliding_window")
    if window is not None and window < query.shape[2]:
        raise ValueError(f"{query.shape[2]} rows exceed the sliding window of {window}")
    unknown = [name for name in ("s_aux", "softcap") if options.get(name) is not None]
    if unknown or attention_mask is not None:
        raise ValueError(f"this attention has no {unknown or 'mask'}")
    usual = query.shape[-1] ** -0.5
    if scaling is not None and scaling != usual:  # what is left for the softmax to scale by is the usual factor
        query = query * (scaling / usual)
    heads = Heads(query[0], key[0], value[0])
    weights = _causal(heads) if weigh is None else weigh(heads)
    return (weights.to(value.dtype) @ repeated(heads)).transpose(0, 1)[None], None


def _causal(heads: Heads) -> torch.Tensor:
    everything = torch.ones(heads.query.shape[1], dtype=torch.bool, device=heads.query.device)
    return attention_weights(heads.query, heads.key, additive_mask(everything))


def repeated(heads: Heads) -> torch.Tensor:
    """The values of every query head, [H, N, D]."""
    return heads.value.repeat_interleave(heads.query.shape[0] // heads.value.shape[0], dim=0)


def _no_mask(*, q_length: int, mask_function: Any = causal_mask_function, **_: Any) -> None:
    """Raise ValueError unless ``mask_function`` is causal for ``q_length`` rows; ours needs no mask for that."""
    rows = torch.arange(q_length)
    allowed = torch.as_tensor(mask_function(0, 0, rows[:, None], rows[None]))
    if not torch.equal(allowed, rows[:, None] >= rows[None]):
        raise ValueError(f"attention that is not causal over all of {q_length} rows")


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@dataclass
class Recorded:
    """What the layers of a dense pass were given.

    * ``rows`` [T, C] enter layer 0; ``given``: per layer what it gets for each of the T rows.
    * ``levels``: ``levels[i]`` [T, C] is added behind layer i, 0 for text (Qwen3-VL's deepstack).
    """

    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    given: list[Given] = field(default_factory=list)
    levels: list[torch.Tensor] = field(default_factory=list)
    last: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def given_to(self, layer: int, rows: torch.Tensor) -> Given:
        """What ``layer`` gets for the ``rows`` [N]."""
        return {name: _gathered(value, rows, _PER_ROW[name]) for name, value in self.given[layer].items()}

    def injected(self, layer: int) -> torch.Tensor:
        """[T, C]: rows that enter at ``layer`` as if the layers before it were identities."""
        return self.rows + sum(self.levels[:layer], torch.zeros_like(self.rows))


class Decoder:
    """The layers of ``model``'s language model, with an attention of ours while they run here."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._text = model.get_decoder()
        self._layers: list[Any] = list(self._text.layers)
        self.num_layers = len(self._layers)

    def embedded(self, tokens: list[int]) -> torch.Tensor:
        """[N, C] of text tokens."""
        rows: torch.Tensor = self._text.embed_tokens(torch.tensor(tokens, dtype=torch.long, device=self._model.device))
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[vocabulary] of a row [C] behind the last layer, in float32."""
        logits: torch.Tensor = self._model.get_output_embeddings()(self._text.norm(hidden))
        return logits.float()

    def numbered(self, hidden: torch.Tensor, ids: torch.Tensor) -> Given:
        """What any layer gets for ``hidden`` [N, C] at the ``ids`` [N], of a model with one id for a row."""
        return {"position_embeddings": self._text.rotary_emb(hidden[None], position_ids=ids[None])}

    def run(self, index: int, hidden: torch.Tensor, given: Given, weigh: Weigh) -> torch.Tensor:
        """[N, C]: layer ``index`` on ``hidden`` [N, C]."""
        with self._our_attention():
            output = self._layers[index](hidden[None], attention_mask=None, weigh=weigh, **given)
        rows: torch.Tensor = (output[0] if isinstance(output, tuple) else output)[0]
        return rows

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        config = self._text.config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before

    def record(self, token_ids: list[int], inputs: Mapping[str, Any]) -> Recorded:
        """One dense pass of Hugging Face over ``token_ids`` [T] and the pixel ``inputs``.

        Raises ValueError where the model does something to a row between its layers, before or behind them, that is
        not in ``Recorded``.
        """
        recorded = Recorded()
        hooks = [
            self._text.register_forward_pre_hook(partial(_record_levels, recorded), with_kwargs=True),
            *(
                layer.register_forward_pre_hook(partial(_record_layer, recorded), with_kwargs=True)
                for layer in self._layers
            ),
            *(layer.register_forward_hook(partial(_record_output, recorded)) for layer in self._layers),
        ]
        accepted = signature(type(self._model).forward).parameters
        extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        try:
            ids = torch.tensor([token_ids], device=self._model.device)
            with self._our_attention():
                output = self._model(input_ids=ids, use_cache=False, **inputs, **extra)
        finally:
            for hook in hooks:
                hook.remove()
        self._check(recorded, token_ids, output.logits[0, -1])
        return recorded

    def _check(self, recorded: Recorded, token_ids: list[int], logits: torch.Tensor) -> None:
        if len(recorded.given) != self.num_layers:
            raise ValueError(f"{len(recorded.given)} of {self.num_layers} layers ran")
        if not torch.equal(recorded.rows[-1], self.embedded(token_ids[-1:])[0]):
            raise ValueError("the model changes its embeddings before the first layer")
        if not torch.allclose(self.logits(recorded.last[-1]), logits.float(), rtol=1e-3, atol=1e-3):
            raise ValueError("the model changes its logits behind norm and head")


def _gathered(value: Any, rows: torch.Tensor, axis: int) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_gathered(each, rows, axis) for each in value)
    return value.index_select(axis, rows)


def _record_levels(recorded: Recorded, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    for features in kwargs.get("deepstack_visual_embeds") or ():
        where = kwargs["visual_pos_masks"][0]
        level = torch.zeros(len(where), features.shape[-1], dtype=features.dtype, device=features.device)
        level[where] = features
        recorded.levels.append(level)


def _record_layer(recorded: Recorded, _module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    hidden = (args[0] if args else kwargs["hidden_states"])[0]
    index = len(recorded.given)
    if index == 0:
        recorded.rows = hidden
    elif not torch.equal(hidden, recorded.last):
        raise ValueError(f"the model changes its rows between layers {index - 1} and {index}")
    recorded.given.append({name: kwargs[name] for name in _PER_ROW if kwargs.get(name) is not None})


def _record_output(recorded: Recorded, _module: Any, _args: Any, output: Any) -> None:
    last = (output[0] if isinstance(output, tuple) else output)[0]
    index = len(recorded.given) - 1
    recorded.last = last + recorded.levels[index] if index < len(recorded.levels) else last
