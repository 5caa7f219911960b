"""How the decoder layers of a model are run: part by part, or whole; see ``plan.form``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from vllm_hidrop.plan.form import Form
from vllm_hidrop.staged.norm import add_norm, can_fuse, fused_add_norm
from vllm_hidrop.staged.rows import Rows

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [T, H * D], key and value [T, G * D] of one layer's attention, after RoPE."""
Observer = Callable[[Any, QKV], QKV | None]
"""(attention module, its Q, K and V) -> the Q, K and V to attend with; None: unchanged."""
Editor = Callable[[Any, QKV, torch.Tensor], None]
"""(attention module, its Q, K and V, its output [T, H * D]): changes the output in place."""


class Layers(Protocol):
    """A model's decoder layers in one form."""

    def run(self, index: int, rows: Rows, observe: Observer | None, edit: Editor | None) -> None:
        """Run a layer on ``rows``, in place."""

    def normed(self, rows: Rows) -> torch.Tensor:
        """The rows' final hidden states [T, C]."""


class StandardLayers:
    """Layers of the standard form; ``observe`` may shorten the rows once Q, K and V are computed."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        self.layers: Sequence[Any] = layers
        self.norm = norm
        self.add_norm = fused_add_norm if can_fuse(norm) else add_norm

    def run(self, index: int, rows: Rows, observe: Observer | None, edit: Editor | None) -> None:
        """Norm, attention, norm, MLP."""
        layer = self.layers[index]
        normed, rows.residual = self.add_norm(layer.input_layernorm, rows.hidden, rows.residual)
        rows.hidden = normed
        with hooked(layer.self_attn.attn, observe, edit):
            attended = layer.self_attn(positions=rows.ids, hidden_states=normed)
        normed, rows.residual = self.add_norm(layer.post_attention_layernorm, attended, rows.residual)
        rows.hidden = layer.mlp(normed)

    def normed(self, rows: Rows) -> torch.Tensor:
        """The final norm of the residual pair's sum."""
        return self.add_norm(self.norm, rows.hidden, rows.residual)[0]


class BlackBoxLayers:
    """Layers that are called whole, as vLLM's own forward calls them: the same numbers to the bit."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        self.layers: Sequence[Any] = layers
        self.norm: Any = norm

    def run(self, index: int, rows: Rows, observe: Observer | None, edit: Editor | None) -> None:
        """Call the layer."""
        attention = attention_of(self.layers[index]) if observe or edit else None
        with hooked(attention, observe, edit):
            rows.hidden, rows.residual = self._call(index, rows, rows.hidden, rows.residual)

    def _call(self, index: int, rows: Rows, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return self.layers[index](positions=rows.ids, hidden_states=hidden, residual=residual)

    def probe(self, index: int, rows: Rows, observe: Observer) -> None:
        """Run a layer as far as its Q, K and V, for ``observe``; ``rows`` stay as they are."""
        copies = rows.hidden.clone(), None if rows.residual is None else rows.residual.clone()

        def stop(attention: Any, qkv: QKV) -> None:
            observe(attention, qkv)
            raise _Probed

        try:
            with hooked(attention_of(self.layers[index]), stop, None):
                self._call(index, rows, *copies)
        except _Probed:
            return
        raise AssertionError(f"layer {index} has not called its attention")

    def normed(self, rows: Rows) -> torch.Tensor:
        """The final norm of the residual pair's sum."""
        hidden: torch.Tensor = self.norm(rows.hidden, rows.residual)[0]
        return hidden


class _Probed(Exception):
    """Ends a layer's forward at its attention."""


FORMS: dict[Form, type[StandardLayers | BlackBoxLayers]] = {
    Form.STANDARD: StandardLayers,
    Form.BLACK_BOX: BlackBoxLayers,
}


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module, of vLLM's class, in a decoder layer."""
    from vllm.model_executor.layers.attention import Attention

    return next(module for module in layer.modules() if isinstance(module, Attention))


@contextmanager
def hooked(attention: nn.Module | None, observe: Observer | None, edit: Editor | None) -> Iterator[None]:
    """Let ``observe`` see an attention module's Q, K and V, and ``edit`` change its output, until exit.

    Without either, a recurrent layer, which has no attention, may run.
    """
    with ExitStack() as handles:
        if observe is not None:
            assert attention is not None
            handles.enter_context(attention.register_forward_pre_hook(observe))
        if edit is not None:
            assert attention is not None
            handles.enter_context(attention.register_forward_hook(edit))
        yield
