"""From readings to VisiPruner's numbers, as arithmetic on plain numbers.

Layers are zero-based, as in the options of `vllm_hidrop.methods.visipruner`. The paper gives thresholds for
LLaVA-1.5-7B and no rule to find others: these rules are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from vllm_hidrop.lab.calibrate.contributions import DECIMALS, Readings
from vllm_hidrop.lab.calibrate.proposal import exit_layer
from vllm_hidrop.methods.scoring import Contribution, select_top
from vllm_hidrop.plan.schedule import Keep

STEP = 10.0**-DECIMALS


@dataclass(frozen=True)
class Thresholds:
    """The magnitudes that the adaptive tests compare with."""

    cosine: float
    norm: float
    exit_cosine: float


@dataclass(frozen=True)
class VisiPrunerProposal:
    """VisiPruner's layers and thresholds; ``exit_layer`` None: no exit. ``shape`` is layers and tokens per image."""

    shallow_layers: int
    filter_layer: int
    exit_layer: int | None
    keep: Keep
    thresholds: Thresholds
    shape: tuple[int, int]
    notes: tuple[str, ...]

    def options(self, fixed: bool) -> dict[str, Any]:
        """The method's options: the layers and the keep themselves where ``fixed``, else the thresholds."""
        chosen: dict[str, Any] = asdict(self.thresholds)
        if fixed:
            chosen = {"filter_layer": self.filter_layer, "keep": self.keep.dump(), "exit_layer": self.exit_layer}
        parts = ["shallow", "middle"] + ["deep"] * (self.exit_layer is not None)
        common = {"parts": parts, "shallow_layers": self.shallow_layers, "sink": "first", "shape": list(self.shape)}
        return common | chosen


def quiet_layers(quiet: Sequence[float], tolerance: float, num_layers: int) -> int:
    """The most first layers that can be quiet, they and every fewer losing at most ``tolerance`` of agreement.

    Two layers at least follow, one to decide and one to act.
    """
    chosen = 0
    while chosen < min(len(quiet), num_layers - 3) and quiet[chosen] >= 1 - tolerance - 1e-9:
        chosen += 1
    return chosen


def filter_layer(cut: Sequence[float | None], shallow: int, tolerance: float) -> tuple[int, str | None]:
    """The deciding layer: the first one past the shallow ones such that no later one loses more than ``tolerance``.

    Without one the layer that loses least, and a note.
    """
    known = {layer: value for layer, value in enumerate(cut) if value is not None and layer > shallow}
    chosen = len(cut)
    while chosen - 1 in known and known[chosen - 1] >= 1 - tolerance - 1e-9:
        chosen -= 1
    if chosen < len(cut):
        return chosen, None
    best = max(known, key=lambda layer: (known[layer], -layer))
    return best, f"every cut changes more answers than the tolerance allows: layer {best}, which changes fewest"


def above(value: float) -> float:
    """The least of the written decimals that is greater, but at most 1."""
    return min(1.0, round(math.floor(value / STEP) * STEP + STEP, DECIMALS))


def below(value: float) -> float:
    """The greatest of the written decimals that is not greater."""
    return round(math.floor(value / STEP + 1e-9) * STEP, DECIMALS)


def cosine_threshold(least: Sequence[Sequence[float]], shallow: int, deciding: int) -> float:
    """The highest cosine below which no sample has a token in a tested layer before the deciding one.

    Where that is the first tested layer: the least that lets every sample be cut there.
    """
    tested = range(shallow + 1, deciding)
    if tested:
        return below(min(row[layer] for row in least for layer in tested))
    return above(max(row[deciding] for row in least))


def cut_layers(least: Sequence[Sequence[float]], shallow: int, cosine: float) -> list[int | None]:
    """By sample, the layer in which the middle test would decide; None: in none."""
    tested = range(shallow + 1, len(least[0]) - 1)
    return [next((layer for layer in tested if row[layer] < cosine), None) for row in least]


def norm_threshold(layers: Sequence[Contribution], keep: Keep) -> float:
    """The middle, median over samples, between the norms of the last kept and the first dropped token.

    ``layers`` are the samples' deciding layers.
    """
    middles = []
    for norm in (layer.norm for layer in layers):
        ranked = sorted(norm.tolist(), reverse=True)
        num_kept = max(1, keep.resolve(len(ranked)))
        middles.append((ranked[num_kept - 1] + ranked[num_kept]) / 2 if num_kept < len(ranked) else 0.0)
    return round(median(middles), DECIMALS)


def exit_threshold(least: Sequence[Mapping[int, float]], leave: int) -> float:
    """The least cosine by which no sample passes two layers in a row that let it leave before layer ``leave``.

    ``least`` is by sample and layer behind the cut the least cosine of the tokens kept. Where none can leave earlier:
    the highest that lets every sample leave as soon as it can.
    """
    pairs = [min(row[at - 1], row[at]) for row in least for at in row if at - 1 in row and at + 1 < leave]
    return above(max(pairs)) if pairs else below(min(value for row in least for value in row.values()))


def propose_visipruner(readings: Readings, keep: Keep, tolerance: float, tokens_per_image: int) -> VisiPrunerProposal:
    """All numbers, and notes; ``keep`` is of each image's own tokens.

    ``tolerance`` is the share of answer tokens that each of the three parts may change. Raises ValueError: fewer than 3
    layers.
    """
    num_layers = len(readings.agreement)
    if num_layers < 3:
        raise ValueError(f"VisiPruner needs at least 3 layers, the model has {num_layers}")
    shallow = quiet_layers(readings.quiet, tolerance, num_layers)
    deciding, note = filter_layer(readings.cut, shallow, tolerance)
    leave = max(exit_layer(readings.agreement, tolerance) - 1, deciding + 2)
    least = readings.least_cosines()
    cosine = cosine_threshold(least, shallow, deciding)
    decided = cut_layers(least, shallow, cosine)
    used = [deciding if layer is None else layer for layer in decided]
    chosen = [layers[at] for layers, at in zip(readings.contributions, used, strict=True)]
    left = [_least_of_kept(layers, at, keep) for layers, at in zip(readings.contributions, used, strict=True)]
    thresholds = Thresholds(cosine, norm_threshold(chosen, keep), exit_threshold(left, min(leave, num_layers)))
    notes = [note] if note else []
    if leave >= num_layers:
        notes.append("every early exit changes more answers than the tolerance allows: no early exit")
    return VisiPrunerProposal(
        shallow_layers=shallow,
        filter_layer=deciding,
        exit_layer=leave if leave < num_layers else None,
        keep=keep,
        thresholds=thresholds,
        shape=(num_layers, tokens_per_image),
        notes=(*notes, _outcome(decided, chosen, thresholds.norm)),
    )


def _least_of_kept(layers: Sequence[Contribution], deciding: int, keep: Keep) -> dict[int, float]:
    """By layer behind the deciding one, the least cosine of the tokens kept, in the dense pass."""
    norm = layers[deciding].norm
    kept = select_top(norm.nan_to_num(0), max(1, keep.resolve(len(norm))))
    return {layer: float(layers[layer].cosine[kept].min()) for layer in range(deciding + 1, len(layers))}


def _outcome(decided: Sequence[int | None], chosen: Sequence[Contribution], norm: float) -> str:
    """What the thresholds do to the samples they were found on."""
    found = [layer for layer in decided if layer is not None]
    if not found:
        return f"by these thresholds none of the {len(decided)} samples is cut"
    counts = [int((each.norm > norm).sum()) for each, layer in zip(chosen, decided, strict=True) if layer is not None]
    return (
        f"by these thresholds {len(found)} of {len(decided)} samples are cut, after layers {min(found)} to "
        f"{max(found)} (zero-based), and keep {min(counts)} to {max(counts)} tokens"
    )
