"""Stages align and B: real patches instead of symbols.

Axes as in ``batches.py``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.train.batches import exact_matches, symbol_table
from vllm_hidrop.lab.train.language import (
    ALL_TYPES,
    Vision,
    accuracies,
    answer_logits,
    answer_loss,
    draw_text,
    trained_in_language,
)
from vllm_hidrop.lab.train.model import HIDDEN_SIZE
from vllm_hidrop.lab.train.optimiser import LearningRates, PairedOptimiser
from vllm_hidrop.lab.train.scenes import NUM_PATCHES, Scene, held_out_seed, make_scene, patch_owners, render
from vllm_hidrop.lab.train.staged import StagedTraining
from vllm_hidrop.lab.train.symbols import SymbolEmbedding
from vllm_hidrop.lab.train.tower import to_pixel_values, tower_features


class SceneFeatures:
    """Tower features of training scenes, computed once and kept in half precision."""

    def __init__(self, model: LlavaForConditionalGeneration, first_seed: int, num_scenes: int) -> None:
        self.scenes = [make_scene(first_seed + index) for index in range(num_scenes)]
        self._features = np.empty((num_scenes, NUM_PATCHES, HIDDEN_SIZE), np.float16)
        for start in trange(0, num_scenes, 16, desc="features", mininterval=5):
            chunk = slice(start, start + 16)
            images = [render(scene) for scene in self.scenes[chunk]]
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                features = tower_features(model, to_pixel_values(images))
            self._features[chunk] = features.numpy()

    def __len__(self) -> int:
        return len(self.scenes)

    def take(self, indices: NDArray[np.int64]) -> tuple[list[Scene], Tensor]:
        """Scenes and their features [S, NUM_PATCHES, D] in float32."""
        features = torch.from_numpy(self._features[indices]).float()
        return [self.scenes[index] for index in indices], features


@torch.no_grad()
def _align_targets(
    model: LlavaForConditionalGeneration, symbols: SymbolEmbedding, scenes: list[Scene]
) -> tuple[Tensor, Tensor]:
    """Symbol embedding of every patch [S, V, D], and which patches show a thing clearly [S, V]."""
    embed_tokens = model.model.language_model.embed_tokens
    targets, weights = [], []
    for scene in scenes:
        owners, is_clear = patch_owners(scene)
        words, centres = (torch.from_numpy(part) for part in symbol_table(scene))
        is_background = torch.arange(len(words)) == len(words) - 1
        targets.append(symbols(embed_tokens, words, centres, is_background)[owners])
        weights.append(torch.from_numpy(np.where(owners >= 0, 1.0, 0.1) * is_clear))
    return torch.stack(targets), torch.stack(weights).float()


def align_projector(
    model: LlavaForConditionalGeneration,
    symbols: SymbolEmbedding,
    features: SceneFeatures,
    num_steps: int,
    seed: int,
) -> dict[str, float]:
    """Regress the projector on the symbol embeddings; returns the last relative error."""
    projector = model.model.multi_modal_projector
    optimiser = PairedOptimiser(projector.named_parameters(), LearningRates(3e-3, 1e-3), num_steps)
    rng = np.random.default_rng([seed, 3])
    errors: list[float] = []
    progress = trange(num_steps, desc="align", mininterval=5)
    for step in progress:
        scenes, patches = features.take(rng.choice(len(features), 8, replace=False))
        targets, weights = _align_targets(model, symbols, scenes)
        squared = (projector(patches) - targets).square().sum(-1) * weights
        scale = (targets.square().sum(-1) * weights).sum()
        optimiser.step(squared.sum() / scale)
        errors.append((squared.sum() / scale).item())
        if step % 50 == 0:
            progress.set_postfix(relative_error=f"{errors[-1]:.4f}")
    return {"relative_squared_error": float(np.mean(errors[-20:]))}


def _see(model: LlavaForConditionalGeneration, features: Tensor) -> Vision:
    embeddings = model.model.multi_modal_projector(features)
    return Vision(embeddings, torch.arange(features.shape[1]).expand(len(features), -1))


@torch.no_grad()
def image_accuracy(
    staged: StagedTraining, model: LlavaForConditionalGeneration, held_out: SceneFeatures
) -> dict[str, float]:
    """Held-out exact match by question type on real patches, without late-read."""
    rng = np.random.default_rng(held_out_seed(1))
    matches: dict[str, list[bool]] = {}
    for start in range(0, len(held_out), 16):
        scenes, features = held_out.take(np.arange(start, min(start + 16, len(held_out))))
        vision = _see(model, features)
        text = draw_text(scenes, rng, 8, ALL_TYPES)
        logits = answer_logits(staged, model, vision, text, rng)
        for name, right in exact_matches(text, logits.argmax(-1)).items():
            matches.setdefault(name, []).extend(right)
    return accuracies(matches)


@dataclass(frozen=True)
class ImagePhase:
    """Stage B: how long and how fast to learn."""

    num_steps: int
    scenes_per_step: int
    rates: LearningRates


def train_on_images(
    staged: StagedTraining,
    model: LlavaForConditionalGeneration,
    features: SceneFeatures,
    held_out: SceneFeatures,
    phase: ImagePhase,
    seed: int,
) -> dict[str, float]:
    """Language model and projector on real patches, in place; returns the held-out figures."""
    projector = model.model.multi_modal_projector
    named = [*trained_in_language(model), *projector.named_parameters(prefix="projector")]
    optimiser = PairedOptimiser(named, phase.rates, phase.num_steps)
    rng = np.random.default_rng([seed, 4])
    progress = trange(phase.num_steps, desc="stage B", mininterval=5)
    for step in progress:
        indices = rng.choice(len(features), phase.scenes_per_step, replace=False)
        scenes, patches = features.take(indices)
        vision = _see(model, patches)
        loss = answer_loss(staged, model, vision, draw_text(scenes, rng, 10, ALL_TYPES), rng)
        optimiser.step(loss)
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 100 == 99:
            progress.write(f"step {step}: {image_accuracy(staged, model, held_out)}")
    return image_accuracy(staged, model, held_out)
