"""Stage A: the vision tower learns to label patches of crowded scenes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.train.model import FEATURE_LAYER, HIDDEN_SIZE
from vllm_hidrop.lab.train.optimiser import LearningRates, PairedOptimiser
from vllm_hidrop.lab.train.questions import grid_cell
from vllm_hidrop.lab.train.scenes import (
    COLOUR_NAMES,
    IMAGE_SIDE,
    NUM_PATCHES,
    WORDS,
    Pixels,
    Scene,
    held_out_seed,
    make_crowded_scene,
    patch_owners,
    render,
)
from vllm_hidrop.lab.train.sprites import KINDS

KIND_LABELS = (*KINDS, "word", "background")
IGNORED = -100
LABEL_SIZES = {
    "kind": len(KIND_LABELS),
    "colour": len(COLOUR_NAMES),
    "word": len(WORDS),
    "row": 3,
    "column": 3,
}
NUM_READOUTS = sum(LABEL_SIZES.values()) + 2
"""Outputs per patch: a logit per value of every label, and the two coordinates of the owner's centre."""
COORDINATE_LOSS_WEIGHT = 4.0


@dataclass(frozen=True)
class PatchLabels:
    """What each patch of S scenes belongs to.

    ``labels[name]`` is int64 [S, NUM_PATCHES], ``IGNORED`` where nothing is asked; ``centres`` [S, NUM_PATCHES, 2] are
    in [-1, 1] and mean something where ``is_owned``.
    """

    labels: dict[str, Tensor]
    centres: Tensor
    is_owned: Tensor


def normalised_centre(centre: tuple[float, float]) -> tuple[float, float]:
    """From pixels to [-1, 1] on both axes."""
    return 2 * centre[0] / IMAGE_SIDE - 1, 2 * centre[1] / IMAGE_SIDE - 1


def _thing_codes(scene: Scene) -> NDArray[np.int64]:
    """One row per thing: kind, colour, word, row, column; the last row is background."""
    rows: list[tuple[int, ...]] = []
    for thing in scene.things:
        word = IGNORED if thing.text is None else WORDS.index(thing.text)
        row, column = grid_cell(thing)
        kind = KIND_LABELS.index(thing.kind)
        rows.append((kind, COLOUR_NAMES.index(thing.colour), word, row, column))
    rows.append((KIND_LABELS.index("background"), *[IGNORED] * 4))
    return np.array(rows, np.int64)


def label_patches(scenes: list[Scene]) -> PatchLabels:
    """Labels of every patch of ``scenes``."""
    codes = np.empty((len(scenes), NUM_PATCHES, len(LABEL_SIZES)), np.int64)
    centres = np.zeros((len(scenes), NUM_PATCHES, 2), np.float32)
    is_owned = np.zeros((len(scenes), NUM_PATCHES), np.bool_)
    for index, scene in enumerate(scenes):
        owners, is_clear = patch_owners(scene)
        codes[index] = np.where(is_clear[:, None], _thing_codes(scene)[owners], IGNORED)
        table = [normalised_centre(thing.centre) for thing in scene.things]
        centres[index] = np.array([*table, (0.0, 0.0)], np.float32)[owners]
        is_owned[index] = is_clear & (owners >= 0)
    labels = {name: torch.from_numpy(codes[..., at]) for at, name in enumerate(LABEL_SIZES)}
    return PatchLabels(labels, torch.from_numpy(centres), torch.from_numpy(is_owned))


def to_pixel_values(images: list[Pixels]) -> Tensor:
    """Images as the checkpoint's image processor makes them: [scenes, 3, side, side] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1.0


def tower_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Patch features that the projector reads, [scenes, NUM_PATCHES, HIDDEN_SIZE]."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for layer in tower.encoder.layers[: FEATURE_LAYER + 1]:
        output = layer(hidden, None)
        hidden = output[0] if isinstance(output, tuple) else output
    features: Tensor = hidden[:, 1:].float()
    return features


def _losses(readouts: Tensor, truth: PatchLabels) -> Tensor:
    parts = readouts.split([*LABEL_SIZES.values(), 2], dim=-1)
    loss = readouts.new_zeros(())
    for logits, labels in zip(parts, truth.labels.values(), strict=False):
        loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    errors = parts[-1][truth.is_owned] - truth.centres[truth.is_owned]
    total: Tensor = loss + COORDINATE_LOSS_WEIGHT * errors.square().mean().sqrt()
    return total


@torch.no_grad()
def patch_accuracy(
    model: LlavaForConditionalGeneration,
    readout: nn.Linear,
    num_scenes: int = 48,
    make: Callable[[int], Scene] = make_crowded_scene,
) -> dict[str, float]:
    """Held-out accuracy of each label, and the centre's root mean square error in pixels."""
    scenes = [make(held_out_seed(index)) for index in range(num_scenes)]
    truth = label_patches(scenes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = tower_features(model, to_pixel_values([render(scene) for scene in scenes]))
    parts = readout(features).split([*LABEL_SIZES.values(), 2], dim=-1)
    figures = {}
    for logits, (name, labels) in zip(parts, truth.labels.items(), strict=False):
        asked = labels != IGNORED
        figures[name] = (logits.argmax(-1) == labels)[asked].float().mean().item()
    errors = (parts[-1] - truth.centres)[truth.is_owned]
    figures["centre_rms_pixels"] = errors.square().mean().sqrt().item() * IMAGE_SIDE / 2
    return figures


def train_tower(
    model: LlavaForConditionalGeneration, num_steps: int, scenes_per_step: int, seed: int
) -> dict[str, float]:
    """Teach the model's tower in place; returns the held-out figures."""
    readout = nn.Linear(HIDDEN_SIZE, NUM_READOUTS)
    tower = model.model.vision_tower
    named = [*tower.named_parameters(prefix="tower"), *readout.named_parameters(prefix="readout")]

    def loss_of(step: int) -> Tensor:
        first = (seed * num_steps + step) * scenes_per_step
        scenes = [make_crowded_scene(first + index) for index in range(scenes_per_step)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = tower_features(model, to_pixel_values([render(scene) for scene in scenes]))
        return _losses(readout(features), label_patches(scenes))

    optimiser = PairedOptimiser(named, LearningRates(3e-3, 3e-3), num_steps)
    optimiser.run("stage A", loss_of, lambda: patch_accuracy(model, readout, 16), every=150)
    return patch_accuracy(model, readout)
