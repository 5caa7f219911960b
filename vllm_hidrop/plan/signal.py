"""The signals: what a method may ask the engine to compute at a cut, under which layer, and what that costs.

A signal is one entry here and one function in ``staged.signals``.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Self

from vllm_hidrop.plan.plan import Plan


class Under(StrEnum):
    """Whose Q, K and V a signal is computed from."""

    LAST_LAYER = "last layer of the old stage"
    NEXT_LAYER = "first layer of the new stage, on all rows before the cut"
    NO_LAYER = "none"

    def layer(self, first_layer: int) -> int | None:
        """The layer whose Q, K and V a cut before ``first_layer`` needs; None: none."""
        return {Under.LAST_LAYER: first_layer - 1, Under.NEXT_LAYER: first_layer}.get(self)

    def can_score(self, first_layer: int, attention_layers: Sequence[int] | None) -> bool:
        """Whether a cut before ``first_layer`` can be scored where these layers have attention (None: all)."""
        layer = self.layer(first_layer)
        return attention_layers is None or layer is None or layer in attention_layers


class Signal(StrEnum):
    """One entry per signal: its name, the layer it is computed under, the rows of attention it costs, what it reads.

    A row of attention is the product of one vector with every prompt row's K or V: 2 H D FLOPs per prompt row. Of
    tokens that the KV cache holds from an earlier step K can be read, Q and V cannot: a signal that needs those of
    every row runs on prompts from their first token on only, so nothing is reused for its methods.
    """

    NEXT_ATTENTION = "next_attention", Under.NEXT_LAYER, 1, False
    """Attention that the last prompt row pays to each vision token."""
    PREVIOUS_ATTENTION = "previous_attention", Under.LAST_LAYER, 1, False
    """Attention that the last prompt row paid to each vision token in the last layer of the old stage."""
    CONTRIBUTION = "contribution", Under.LAST_LAYER, 3, True
    """What each vision token adds to the last prompt row's attention output: one product with K, two with V."""
    TEXT_ATTENTION = "text_attention", Under.LAST_LAYER, None, True
    """Attention that each vision token gets from all text rows behind the first image."""
    NONE = "none", Under.NO_LAYER, 0, False
    """Nothing: the score depends on the token's place only."""

    under: Under
    rows: int | None
    """Rows of attention; None for as many as the prompt has text rows."""
    needs_every_row: bool
    """Whether it reads Q or V of more rows than the last."""

    def __new__(cls, name: str, under: Under, rows: int | None, needs_every_row: bool) -> Self:
        """A member whose value is its name."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.under, member.rows, member.needs_every_row = under, rows, needs_every_row
        return member

    def attention_rows(self, plan: Plan) -> int:
        """Rows of attention that the signal costs at one cut of a prompt."""
        return plan.num_prompt_tokens - plan.num_vision_tokens if self.rows is None else self.rows
