"""The four curves of HiDrop's schedule search (paper sections 2 and 3), averaged over samples.

Every sample weighs the same. Entry 0 of a curve belongs to the paper's layer 1.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median_low
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint, Encoded
from vllm_hidrop.lab.calibrate.recording import Recording, recorded, states_without_vision
from vllm_hidrop.lab.calibrate.samples import Sample

DECIMALS = 6


@dataclass(frozen=True)
class Settings:
    """What the paper leaves open: ILVAS's windows (layers between its two ends) and K, and where answers are cut.

    The first of ``windows`` decides; ``top_tokens`` is K, the number of most attended vision tokens.
    """

    windows: tuple[int, ...] = (2, 4)
    top_tokens: int = 32
    max_answer_tokens: int = 16


@dataclass(frozen=True)
class Curves:
    """Means over samples, by layer.

    Attributes:
        vision_tokens: fewest, median and most vision tokens of an image.
        vision_intra, text_intra: cosine between a layer's input and output, per modality.
        cross: cosine between instruction states after a layer with another and with the own image.
        ilvas: by window n, agreement of the attention at layer l and l + n; shorter than the others by n.
        agreement: entry x - 1: share of answer tokens unchanged when layer x and later see no vision.
        accuracy: as agreement, share of samples whose whole answer is the data's; None when the data has none.
        full_accuracy: the same with nothing dropped.
    """

    num_samples: int
    vision_tokens: tuple[int, int, int]
    vision_intra: list[float]
    text_intra: list[float]
    cross: list[float]
    ilvas: dict[int, list[float]]
    agreement: list[float]
    accuracy: list[float] | None
    full_accuracy: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain data; the windows of ``ilvas`` become strings."""
        return asdict(self) | {"ilvas": {str(window): curve for window, curve in self.ilvas.items()}}


def check_settings(settings: Settings, num_layers: int) -> None:
    """ValueError, naming the window, where the model is too shallow for it."""
    for window in settings.windows:
        if not 1 <= window < num_layers:
            raise ValueError(f"a window must be in [1, {num_layers - 1}] for {num_layers} layers, got {window}")


def measure(checkpoint: Checkpoint, samples: Iterable[Sample], settings: Settings) -> Curves:
    """Measure all curves, one sample at a time; ValueError: all images are the same, so that none is another one."""
    check_settings(settings, checkpoint.num_layers)
    counts: list[int] = []
    found: dict[str, list[list[float]]] = defaultdict(list)
    seen: list[Image.Image] = []  # at most two: the last image, and the last one that differs from it
    for sample in samples:
        other = next((image for image in reversed(seen) if not _same(image, sample.image)), None)
        num_vision, curves = _measure_one(checkpoint, sample, other, settings)
        counts.append(num_vision)
        for name, curve in curves.items():
            found[name].append(curve)
        seen = [*([other] if other else seen[:1]), sample.image]
    if "cross" not in found:
        raise ValueError("every sample shows the same image; cross-image similarity needs different ones")
    means = {name: [round(fmean(values), DECIMALS) for values in zip(*found[name], strict=True)] for name in found}
    accuracy = means.get("accuracy")
    return Curves(
        num_samples=len(counts),
        vision_tokens=(min(counts), median_low(counts), max(counts)),
        vision_intra=means["vision_intra"],
        text_intra=means["text_intra"],
        cross=means["cross"],
        ilvas={window: means[f"ilvas {window}"] for window in settings.windows},
        agreement=means["agreement"],
        accuracy=accuracy[:-1] if accuracy else None,
        full_accuracy=accuracy[-1] if accuracy else None,
    )


def _measure_one(
    checkpoint: Checkpoint, sample: Sample, other: Image.Image | None, settings: Settings
) -> tuple[int, dict[str, list[float]]]:
    """Vision tokens and curves of one sample; no ``cross`` without another image, no ``accuracy`` without an answer."""
    encoded = checkpoint.encode(sample.image, sample.question, sample.answer, settings.max_answer_tokens)
    own = _record(checkpoint, encoded)
    curves = {"vision_intra": own.vision_intra, "text_intra": own.text_intra}
    if other is not None:
        # The same size, so that a model of variable resolution has the same rows at the same positions.
        fitted = other.resize(sample.image.size)
        curves["cross"] = cross_similarity(own, _record(checkpoint, checkpoint.encode(fitted, sample.question, "", 0)))
    for window in settings.windows:
        curves[f"ilvas {window}"] = ilvas_curve(own.attention, window, settings.top_tokens)
    return len(own.rows.vision), curves | exit_sweep(checkpoint, own, encoded)


def _same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def _record(checkpoint: Checkpoint, encoded: Encoded) -> Recording:
    with recorded(checkpoint.llm.layers, encoded.rows) as recording:
        checkpoint.forward(encoded.inputs)
    return recording


def cross_similarity(own: Recording, other: Recording) -> list[float]:
    """Mean cosine of the instruction rows after every layer, between two passes that differ in the image."""
    return [
        float(cosine_similarity(a.float(), b.float(), dim=-1).mean())
        for a, b in zip(own.instruction, other.instruction, strict=True)
    ]


def ilvas_curve(attention: Sequence[Tensor], window: int, top_tokens: int) -> list[float]:
    """ILVAS(l, l + window, K) for every l that has a layer l + window.

    ``attention`` is by layer what the last prompt row pays to vision, [H, V]; ``top_tokens`` is K, at most V.
    """
    curve = []
    for now, later in zip(attention, attention[window:], strict=False):
        top = now.mean(0).topk(min(top_tokens, now.shape[1])).indices
        curve.append(float(cosine_similarity(now[:, top], later[:, top], dim=0).mean()))
    return curve


def exit_sweep(checkpoint: Checkpoint, own: Recording, encoded: Encoded) -> dict[str, list[float]]:
    """Drop vision at every layer in turn and predict the answer token by token, the right ones before it given.

    The result has ``agreement`` by layer and, where the data has an answer, ``accuracy`` by layer, then without exit.
    """
    layers = checkpoint.llm.layers
    end = slice(-encoded.rows.num_answer - 1, -1)
    full = checkpoint.predict(own.last_states[end])
    tokens = [checkpoint.predict(states_without_vision(layers, own, first)[end]) for first in range(len(layers))]
    curves = {"agreement": [float((guess == full).float().mean()) for guess in tokens]}
    if encoded.has_answer:
        curves["accuracy"] = [float(torch.equal(guess, encoded.answer)) for guess in (*tokens, full)]
    return curves
