"""FastV: drop half of the vision tokens after the second layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_hidrop.methods.base import Method, ModelShape
from vllm_hidrop.methods.scored_layers import nearest_cuts
from vllm_hidrop.methods.scoring import Signals, attention_score
from vllm_hidrop.plan.schedule import KeepValue, Schedule
from vllm_hidrop.plan.signal import Signal


@dataclass(frozen=True)
class FastV(Method):
    """Rank vision tokens by the attention the last prompt row pays them and drop the lowest.

    **Source** arXiv 2403.06764 section 4; ranking as in the released code: attention of layer ``layer - 1``
    (zero-based), last row, mean over heads.

    **Differs** the paper's text says the average attention received; the code, and we, use the last row. The authors'
    first fork of Transformers ranks again for every generated token, by that token's row, so its set moves while it
    answers; here the prompt's set stays, as in their version with a KV cache. The prompt's sets are the same on equal
    float32 weights. Of several images each keeps its own share.

    **Options** ``layer`` (zero-based first pruned layer, >= 1, default 2), ``keep`` (fraction or count per image,
    default 0.5), ``exit_layer`` (zero-based first layer without vision tokens, default never; an extension).
    """

    name = "fastv"
    paper = "arXiv 2403.06764"
    summary = "all, then the tokens the last row attends to most"
    signal = Signal.PREVIOUS_ATTENTION
    layer_options = tuned_options = ("layer",)
    elsewhere = "not tuned: the layer of 32- and 40-layer LLaVA-1.5"

    layer: int = 2
    keep: KeepValue = 0.5
    exit_layer: int | None = None

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"layer must be >= 1 (its ranking needs the layer before), got {self.layer}")

    def moved(self, shape: ModelShape) -> Mapping[str, object]:
        """``layer``, moved."""
        (layer,) = nearest_cuts(self.signal, (self.layer,), shape)
        return {} if layer == self.layer else {"layer": layer}

    def schedule(self, shape: ModelShape) -> Schedule:
        """All, then ``keep`` from ``layer`` on."""
        keeps: dict[int, KeepValue] = {0: "all", self.layer: self.keep}
        if self.exit_layer is not None:
            keeps[self.exit_layer] = 0
        return Schedule.of(keeps, shape.num_layers)

    def score(self, signals: Signals) -> torch.Tensor:
        """The last prompt row's attention under layer ``layer - 1``."""
        return attention_score(signals)
