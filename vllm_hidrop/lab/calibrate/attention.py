"""The attention function of a calibrated text model: PyTorch's, which a hook of a layer can watch or edit.

It is registered in transformers' table of attention functions, so every text model hands it the Q, K and V it made,
whatever its norms, rotary embedding or position ids. Axes: N rows, H heads, K heads of keys, D head size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hidrop_watched"
"""The name in transformers' table."""
HOOK = "hidrop_attention_hook"
"""The attribute of an attention module that holds its hook."""


class Heads(NamedTuple):
    """A layer's query [H, N, D], key and value [K, N, D] behind the rotary embedding, and the logits' factor."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


Attend = Callable[[Tensor], Tensor]
"""From values [K, N, D] to the attention's output [N, H, D], with the layer's own weights."""
AttentionHook = Callable[[Heads, Attend], Tensor]
"""Called in place of the attention; returns its output [N, H, D]."""


def register() -> str:
    """Put the function into transformers' table, and return its name."""
    AttentionInterface.register(NAME, _watched_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    hook: AttentionHook | None = getattr(module, HOOK, None)
    if hook is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def attend(values: Tensor) -> Tensor:
        return sdpa_attention_forward(module, query, key, values[None], attention_mask, **kwargs)[0][0]

    return hook(Heads(query[0], key[0], value[0], kwargs["scaling"]), attend)[None], None


@contextmanager
def hooked(layers: Iterable[nn.Module], hooks: Iterable[AttentionHook]) -> Iterator[None]:
    """Within this context the attentions of these layers, one hook each, call their hooks."""
    modules: list[Any] = [layer.self_attn for layer in layers]
    for module, hook in zip(modules, hooks, strict=True):
        setattr(module, HOOK, hook)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, HOOK)
