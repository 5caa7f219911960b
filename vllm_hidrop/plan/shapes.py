"""The sizes of a text model's layers, from its Hugging Face configuration, and their FLOPs.

A multiply-add counts as 2 FLOPs. Norms, activations, RoPE, softmax and sampling are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Experts:
    """Gated MLPs of which a router chooses ``num_active`` for every row, in place of the MLP in some ``layers``.

    ``intermediate_size`` is one expert's; ``shared_size`` that of the expert, or experts together, that every row runs.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    shared_size: int
    layers: tuple[int, ...]

    @property
    def active_size(self) -> int:
        """Intermediate sizes of the experts that a row runs, together."""
        return self.num_active * self.intermediate_size + self.shared_size

    def mean_met(self, num_rows: int) -> float:
        """Experts that at least one of ``num_rows`` rows chooses, on average, if each chooses evenly and alone."""
        return self.num_experts * (1 - (1 - self.num_active / self.num_experts) ** num_rows)


@dataclass(frozen=True)
class Recurrence:
    """Gated DeltaNets in place of attention in some ``layers`` (Qwen3.5).

    Each of ``num_heads`` has a state of ``key_size`` by ``value_size`` in float32; ``num_key_heads`` have queries and
    keys; queries, keys and values pass a convolution over ``kernel_size`` rows, the last of which are kept.
    """

    num_heads: int
    num_key_heads: int
    key_size: int
    value_size: int
    kernel_size: int
    layers: tuple[int, ...]

    @property
    def mixed_size(self) -> int:
        """Elements of a row's queries, keys and values."""
        return 2 * self.num_key_heads * self.key_size + self.num_heads * self.value_size

    @property
    def flops_per_row(self) -> int:
        """``6 H D_k D_v`` of one layer: what the state holds for the key, its update, what it holds for the query."""
        return 6 * self.num_heads * self.key_size * self.value_size

    @property
    def state_bytes(self) -> int:
        """Of one request, in all layers."""
        state = 4 * self.num_heads * self.key_size * self.value_size
        return len(self.layers) * (state + 2 * self.mixed_size * (self.kernel_size - 1))

    def num_weights(self, hidden_size: int) -> int:
        """Of one layer: queries, keys, values, their gate, two numbers per head, the convolution, the output."""
        width = self.num_heads * self.value_size
        return hidden_size * (self.mixed_size + 2 * width + 2 * self.num_heads) + self.mixed_size * self.kernel_size


@dataclass(frozen=True)
class TextShape:
    """Sizes of a Llama-like decoder with gated MLP and grouped-query attention; K and V in float16 or bfloat16.

    ``intermediate_size`` is the MLP's, in the layers without ``experts``. Beside ``recurrence``, attention has a gate
    as wide as its queries.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    kv_bytes_per_element: int = 2
    experts: Experts | None = None
    recurrence: Recurrence | None = None

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """The layers that hold a state, not K and V."""
        return self.recurrence.layers if self.recurrence else ()

    @property
    def num_attention_layers(self) -> int:
        """Layers that hold K and V."""
        return self.num_layers - len(self.recurrent_layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's states."""
        return self.recurrence.state_bytes if self.recurrence else 0

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one row's K and V in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.kv_bytes_per_element

    @property
    def qkv_flops_per_row(self) -> int:
        """FLOPs of one row's Q, K and V projections in one layer: ``2 C (H + 2 G) D``; a gate counts as H more."""
        heads = self.num_heads * (2 if self.recurrence else 1) + 2 * self.num_kv_heads
        return 2 * self.hidden_size * heads * self.head_size

    @property
    def active_size(self) -> int:
        """The MLP's size as a row runs it; of a model with experts, in the layers that have them."""
        return self.experts.active_size if self.experts else self.intermediate_size

    def layer_flops(self, rows: int, layer: int) -> int:
        """FLOPs of one decoder layer that prefills ``rows`` rows.

        ``T (2 C (H + 2 G) D + 2 H D C + 6 C M) + 4 H D T (T + 1) / 2`` with T rows, C hidden size, H query heads,
        G KV heads, D head size, M the MLP's size: 2 per weight and row for Q, K, V, output and the three MLP matrices;
        then, causally, ``Q K^T`` and the sum over V. With experts, M is the active ones' and a router of E experts adds
        ``2 C E``. A recurrent layer costs every row the same, see :class:`Recurrence`.
        """
        weights = 2 * rows * int(self._layer_weights(layer, self._num_active))
        if self.recurrence and layer in self.recurrence.layers:
            return weights + rows * self.recurrence.flops_per_row
        return weights + 2 * self.num_heads * self.head_size * rows * (rows + 1)

    def layers_flops(self, rows: int, layers: Iterable[int]) -> int:
        """The sum of :meth:`layer_flops` over ``layers``."""
        return sum(self.layer_flops(rows, layer) for layer in layers)

    @property
    def lm_head_flops(self) -> int:
        """FLOPs of the one row whose logits prefill needs: ``2 C vocabulary``."""
        return 2 * self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """Weights of all matrices in memory, every expert's and the LM head's included; without token embeddings."""
        return int(self._weights(self.experts.num_experts if self.experts else 0))

    @property
    def active_weights(self) -> int:
        """Of :attr:`num_weights`, those that one row of a decode step meets; each costs it 2 FLOPs."""
        return int(self._weights(self._num_active))

    def weights_read(self, num_rows: int) -> float:
        """Of :attr:`num_weights`, those that a decode step of ``num_rows`` reads: of the experts, ``mean_met``."""
        return self._weights(self.experts.mean_met(num_rows) if self.experts else 0)

    @property
    def _num_active(self) -> int:
        return self.experts.num_active if self.experts else 0

    def _weights(self, num_experts: float) -> float:
        layers = sum(self._layer_weights(layer, num_experts) for layer in range(self.num_layers))
        return layers + self.hidden_size * self.vocab_size

    def _layer_weights(self, layer: int, num_experts: float) -> float:
        """Weights of a layer, of ``num_experts`` of its experts if it has any."""
        attention = self.qkv_flops_per_row // 2 + self.num_heads * self.head_size * self.hidden_size
        if self.recurrence and layer in self.recurrence.layers:
            attention = self.recurrence.num_weights(self.hidden_size)
        if self.experts is None or layer not in self.experts.layers:
            return attention + 3 * self.hidden_size * self.intermediate_size
        of_experts = num_experts * self.experts.intermediate_size + self.experts.shared_size
        return attention + self.hidden_size * (3 * of_experts + self.experts.num_experts)


LLAVA_7B = TextShape(32, 4096, 11008, 32, 32, 128, 32064)
"""LLaVA-1.5-7B's language model, Vicuna-7B."""
LLAVA_13B = TextShape(40, 5120, 13824, 40, 40, 128, 32064)
"""LLaVA-1.5-13B's language model, Vicuna-13B."""


def text_shape(config: Any) -> TextShape:
    """Sizes of a Hugging Face text configuration."""
    heads = config.num_attention_heads
    return TextShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        experts=_experts(config),
        recurrence=_recurrence(config),
    )


def _recurrence(config: Any) -> Recurrence | None:
    """As Qwen3.5's configuration says."""
    if not hasattr(config, "linear_num_value_heads"):
        return None
    return Recurrence(
        num_heads=config.linear_num_value_heads,
        num_key_heads=config.linear_num_key_heads,
        key_size=config.linear_key_head_dim,
        value_size=config.linear_value_head_dim,
        kernel_size=config.linear_conv_kernel_dim,
        layers=tuple(layer for layer, kind in enumerate(config.layer_types) if kind == "linear_attention"),
    )


def _experts(config: Any) -> Experts | None:
    """As Qwen3's (every ``decoder_sparse_step``-th layer) and GLM-4.5's (all but the first) configurations say."""
    size = getattr(config, "moe_intermediate_size", None)
    if size is None:
        return None
    first, step = getattr(config, "first_k_dense_replace", 0), getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or ()
    shared = getattr(config, "shared_expert_intermediate_size", None) or getattr(config, "n_shared_experts", 0) * size
    return Experts(
        num_experts=getattr(config, "num_experts", None) or config.n_routed_experts,
        num_active=config.num_experts_per_tok,
        intermediate_size=size,
        shared_size=shared,
        layers=tuple(
            layer
            for layer in range(config.num_hidden_layers)
            if layer >= first and (layer + 1) % step == 0 and layer not in dense
        ),
    )
