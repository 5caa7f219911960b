"""What VisiPruner's numbers are read from: which layer reads the image, and which layers can do without it.

Layers are zero-based, as in the options of `vllm_hidrop.methods.visipruner`. Every sample weighs the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import Any

import torch
from torch import Tensor, nn

from vllm_hidrop.lab.calibrate.attention import Attend, AttentionHook, Heads, hooked
from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint, Encoded, Rows
from vllm_hidrop.lab.calibrate.recording import Recording, recorded, states_after_cut, states_without_vision
from vllm_hidrop.lab.calibrate.samples import Sample
from vllm_hidrop.methods.scoring import Contribution
from vllm_hidrop.plan.schedule import Keep

DECIMALS = 6


@dataclass(frozen=True)
class Readings:
    """How the samples' images are read; every list but the first has one entry per layer, or per number of layers.

    Attributes:
        contributions: by sample and layer, what every vision token adds to the last prompt row's attention output.
        quiet: entry s - 1: share of answer tokens unchanged when the first s layers are quiet, as VisiPruner's shallow
            layers are; up to half of the layers.
        cut: entry f: the same when only the tokens that add most under layer f enter the layers behind it; None where
            a deepstack level is still to come.
        agreement: entry x: the same when layer x and later see no vision.
    """

    contributions: list[list[Contribution]]
    quiet: list[float]
    cut: list[float | None]
    agreement: list[float]

    @property
    def vision_tokens(self) -> tuple[int, int, int]:
        """Fewest, median and most vision tokens of an image."""
        counts = [len(layers[0].norm) for layers in self.contributions]
        return min(counts), median_low(counts), max(counts)

    def least_cosines(self) -> list[list[float]]:
        """By sample and layer, the least cosine of any token: what the middle test compares."""
        return [[float(layer.cosine.min()) for layer in layers] for layers in self.contributions]

    def as_json(self) -> dict[str, Any]:
        """Plain data; of the contributions the least cosine and the highest norm of every sample and layer."""
        norms = [[round(float(layer.norm.max()), DECIMALS) for layer in layers] for layers in self.contributions]
        cosines = [[round(cosine, DECIMALS) for cosine in row] for row in self.least_cosines()]
        curves = {"quiet": self.quiet, "cut": self.cut, "agreement": self.agreement}
        return curves | {"vision_tokens": self.vision_tokens, "least_cosine": cosines, "highest_norm": norms}


def read(checkpoint: Checkpoint, samples: Iterable[Sample], keep: Keep, max_answer_tokens: int) -> Readings:
    """Measure one sample at a time; ``keep`` is of each image's own tokens."""
    contributions, quiet, cut, agreement = [], [], [], []
    first_cut = max(checkpoint.family.num_levels(checkpoint.config) - 1, 0)
    for sample in samples:
        encoded = checkpoint.encode(sample.image, sample.question, sample.answer, max_answer_tokens)
        num_kept = max(1, keep.resolve(len(encoded.rows.vision)))
        layers = checkpoint.llm.layers
        with recorded(layers, encoded.rows, num_kept) as own:
            checkpoint.forward(encoded.inputs)
        unchanged = _Unchanged(checkpoint, own, encoded.rows)
        contributions.append([Contribution(*(part.cpu() for part in each)) for each in own.contributions])
        quiet.append([unchanged(_quiet_states(checkpoint, encoded, n + 1)) for n in range(len(layers) // 2)])
        cut.append([unchanged(states_after_cut(layers, own, f + 1)) for f in range(first_cut, len(layers) - 1)])
        agreement.append([unchanged(states_without_vision(layers, own, x)) for x in range(len(layers))])
    return Readings(contributions, _means(quiet), [None] * first_cut + _means(cut), _means(agreement))


class _Unchanged:
    """The share of a sample's answer tokens that other last-layer states [rows, C] predict as the dense ones do."""

    def __init__(self, checkpoint: Checkpoint, own: Recording, rows: Rows) -> None:
        self.checkpoint = checkpoint
        self.end = slice(-rows.num_answer - 1, -1)
        self.full = checkpoint.predict(own.last_states[self.end])

    def __call__(self, states: Tensor) -> float:
        return float((self.checkpoint.predict(states[self.end]) == self.full).float().mean())


def _means(rows: list[list[float]]) -> list[Any]:
    return [round(fmean(values), DECIMALS) for values in zip(*rows, strict=True)]


def _quiet_states(checkpoint: Checkpoint, encoded: Encoded, num_layers: int) -> Tensor:
    """Last-layer states [T, C] of the text rows when the first ``num_layers`` layers are quiet."""
    states: list[Tensor] = []

    def keep_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        states.append(output[0][encoded.rows.text])

    layers = checkpoint.llm.layers
    handle = layers[-1].register_forward_hook(keep_output)
    try:
        with hooked(layers[:num_layers], [quiet_hook(encoded.rows, layer == 0) for layer in range(num_layers)]):
            checkpoint.forward(encoded.inputs)
    finally:
        handle.remove()
    return states[0]


def quiet_hook(rows: Rows, is_first: bool) -> AttentionHook:
    """VisiPruner's edit of a shallow layer (``form`` "substitution", ``sink`` "first").

    The prompt's text rows see nothing of the image, in the first layer its first token with the weight of all; there
    vision rows see no vision. Weights are not renormalised. Rows of the answer see the image, as in decode.
    """
    vision, text = rows.vision, rows.prompt_text

    @torch.no_grad()
    def edited(heads: Heads, attend: Attend) -> Tensor:
        output, blind = attend(heads.value), heads.value.clone()
        blind[:, vision] = 0
        seen = blind
        if is_first:
            seen = heads.value.clone()
            seen[:, vision] = heads.value[:, vision[:1]]
            output[vision] = attend(blind)[vision]
        output[text] = attend(seen)[text]
        return output

    return edited
