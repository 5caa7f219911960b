"""Stages S, align and B of embedded training: answers about symbols, then about images. Axes as in ``batches.py``."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import trange
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.train.batches import (
    IGNORED,
    SymbolBatch,
    TextBatch,
    exact_matches,
    make_symbols,
    pack_questions,
    random_words,
    symbol_table,
)
from vllm_hidrop.lab.train.initial import EMBEDDING_STD, shared_part
from vllm_hidrop.lab.train.model import HIDDEN_SIZE
from vllm_hidrop.lab.train.optimiser import LearningRates, PairedOptimiser
from vllm_hidrop.lab.train.prefix_llm import LateRead, Prefix, SharedImage
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, draw_questions
from vllm_hidrop.lab.train.scenes import NUM_PATCHES, Scene, held_out_seed, make_scene, patch_owners, render
from vllm_hidrop.lab.train.schedules import DENSE, LATE_INJECTION, with_schedule
from vllm_hidrop.lab.train.staged import StagedTraining
from vllm_hidrop.lab.train.tower import to_pixel_values, tower_features
from vllm_hidrop.lab.train.vocabulary import BOS, PAD, SYSTEM, TOKEN_IDS, USER
from vllm_hidrop.plan.positions import PositionScheme

FIRST_READING_LAYER = 3
SYSTEM_FRACTION = 0.12
MAX_SYSTEM_WORDS = 12
ALL_TYPES = tuple(QUESTION_TYPES)
ONE_HOP_TYPES = ("colour", "object", "where", "exist", "read")
Figures = dict[str, float]


# --- Answering: one image, many questions, one loss --------------------------------------------


@dataclass(frozen=True)
class Vision:
    """Vision embeddings [S, V, D] and the patch index of each, [S, V] ascending."""

    embeddings: Tensor
    patches: Tensor


def _prefix(
    model: LlavaForConditionalGeneration, vision: Vision, rng: np.random.Generator, scheme: PositionScheme
) -> Prefix:
    ids = [TOKEN_IDS[BOS]]
    if rng.random() < SYSTEM_FRACTION:
        num_words = int(rng.integers(1, MAX_SYSTEM_WORDS + 1))
        ids += [TOKEN_IDS[SYSTEM], *random_words(num_words, rng)]
    ids.append(TOKEN_IDS[USER])
    num_scenes = len(vision.patches)
    head = model.model.language_model.embed_tokens(torch.tensor(ids)).expand(num_scenes, -1, -1)
    positions = torch.arange(len(ids)).expand(num_scenes, -1)
    embeddings = torch.cat([head, vision.embeddings], dim=1)
    text_start = len(ids) if scheme is PositionScheme.GROUPED else len(ids) + NUM_PATCHES
    return Prefix(embeddings, torch.cat([positions, vision.patches + len(ids)], 1), len(ids), text_start)


def answer_logits(
    staged: StagedTraining,
    model: LlavaForConditionalGeneration,
    vision: Vision,
    text: TextBatch,
    rng: np.random.Generator,
    late: LateRead | None = None,
) -> Tensor:
    """Next-token logits of the text rows, [S, T, vocabulary]."""
    states = SharedImage(staged)(_prefix(model, vision, rng, staged.position_scheme), text, late)
    return F.linear(states, model.lm_head.weight)


def answer_loss(
    staged: StagedTraining,
    model: LlavaForConditionalGeneration,
    vision: Vision,
    text: TextBatch,
    rng: np.random.Generator,
) -> Tensor:
    """Mean cross-entropy of the answers with late-read training, a scalar; it needs 2 scenes or more."""
    late = LateRead(FIRST_READING_LAYER, int(rng.integers(1, len(vision.patches))))
    logits = answer_logits(staged, model, vision, text, rng, late)
    return F.cross_entropy(logits.flatten(0, 1), text.targets.flatten(), ignore_index=IGNORED)


def accuracies(matches: dict[str, list[bool]]) -> Figures:
    """Share of exact matches by question type."""
    return {name: round(sum(right) / len(right), 3) for name, right in sorted(matches.items())}


def draw_text(scenes: list[Scene], rng: np.random.Generator, num_questions: int, types: tuple[str, ...]) -> TextBatch:
    """Pack fresh questions, the same number for every scene."""
    per_scene = [draw_questions(scene, rng, num_questions, types) for scene in scenes]
    return pack_questions(per_scene, rng)


def trained_in_language(
    model: LlavaForConditionalGeneration,
) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of the language model and its output head, by name."""
    yield from model.model.language_model.named_parameters(prefix="llm")
    yield from model.lm_head.named_parameters(prefix="lm_head")


# --- Stage S: symbolic scenes ------------------------------------------------------------------


class SymbolEmbedding(nn.Module):
    """Embeds a symbolic vision token: its words, less what marks them as text, plus its centre; or background."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_centre = nn.Parameter(torch.randn(2, HIDDEN_SIZE) * 2 * EMBEDDING_STD)
        self.embed_background = nn.Parameter(torch.randn(HIDDEN_SIZE) * EMBEDDING_STD)
        self.embed_offset = nn.Parameter(-shared_part(HIDDEN_SIZE))

    def forward(self, embed_tokens: nn.Module, words: Tensor, centres: Tensor, is_background: Tensor) -> Tensor:
        """[..., V, D] from words [..., V, NUM_CODE_WORDS], centres [..., V, 2] and is_background [..., V]."""
        embedded: Tensor = embed_tokens(words)
        is_word = (words != TOKEN_IDS[PAD]).unsqueeze(-1)
        summed = ((embedded + self.embed_offset) * is_word).sum(-2)
        placed = summed + centres @ self.embed_centre
        return torch.where(is_background.unsqueeze(-1), self.embed_background, placed)


@dataclass(frozen=True)
class SymbolPhase:
    """A part of stage S: how many symbols a scene has, and which questions are asked."""

    num_steps: int
    num_tokens: int
    types: tuple[str, ...]
    rates: LearningRates


def _embed_symbols(model: LlavaForConditionalGeneration, symbols: SymbolEmbedding, batch: SymbolBatch) -> Vision:
    embed_tokens = model.model.language_model.embed_tokens
    embedded = symbols(embed_tokens, batch.words, batch.centres, batch.is_background)
    return Vision(embedded, batch.patches)


@torch.no_grad()
def symbol_accuracy(
    model: LlavaForConditionalGeneration,
    symbols: SymbolEmbedding,
    phase: SymbolPhase,
    num_scenes: int = 128,
) -> Figures:
    """Exact match of the dense model by question type on held-out symbolic scenes."""
    rng = np.random.default_rng(held_out_seed(0))
    scenes = [make_scene(held_out_seed(index)) for index in range(num_scenes)]
    vision = _embed_symbols(model, symbols, make_symbols(scenes, phase.num_tokens, rng))
    text = draw_text(scenes, rng, 8, phase.types)
    logits = answer_logits(with_schedule(model, DENSE), model, vision, text, rng)
    return accuracies(exact_matches(text, logits.argmax(-1)))


def train_on_symbols(
    model: LlavaForConditionalGeneration,
    symbols: SymbolEmbedding,
    phase: SymbolPhase,
    scenes_per_step: int,
    seed: int,
) -> Figures:
    """Train one phase of stage S in place; returns the held-out figures.

    Every other step injects late, so that the language model is a base for dense and HiDrop training alike.
    """
    rng = np.random.default_rng([seed, phase.num_tokens])
    forwards = with_schedule(model, DENSE), with_schedule(model, LATE_INJECTION)

    def loss_of(step: int) -> Tensor:
        scenes = [make_scene(int(at)) for at in rng.integers(0, 2**29, scenes_per_step)]
        batch = make_symbols(scenes, phase.num_tokens, rng)
        text = draw_text(scenes, rng, 8, phase.types)
        return answer_loss(forwards[step % 2], model, _embed_symbols(model, symbols, batch), text, rng)

    named = [*trained_in_language(model), *symbols.named_parameters()]
    optimiser = PairedOptimiser(named, phase.rates, phase.num_steps)
    optimiser.run(f"stage S {phase.num_tokens}", loss_of, lambda: symbol_accuracy(model, symbols, phase, 64))
    return symbol_accuracy(model, symbols, phase)


# --- Stages align and B: real patches instead of symbols ---------------------------------------


class SceneFeatures:
    """Tower features of scenes, computed once and kept in half precision."""

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
    """Symbol embedding of every patch [S, V, D], and its weight [S, V]: thing 1, background 0.1, unclear 0."""
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
) -> Figures:
    """Regress the projector on the symbol embeddings; returns the relative squared error, mean of the last 20 steps."""
    projector = model.model.multi_modal_projector
    rng = np.random.default_rng([seed, 3])

    def loss_of(_: int) -> Tensor:
        scenes, patches = features.take(rng.choice(len(features), 8, replace=False))
        targets, weights = _align_targets(model, symbols, scenes)
        squared = (projector(patches) - targets).square().sum(-1) * weights
        scale = (targets.square().sum(-1) * weights).sum()
        loss: Tensor = squared.sum() / scale
        return loss

    errors = PairedOptimiser(projector.named_parameters(), LearningRates(3e-3, 1e-3), num_steps).run("align", loss_of)
    return {"relative_squared_error": float(np.mean(errors[-20:]))}


def _see(model: LlavaForConditionalGeneration, features: Tensor) -> Vision:
    embeddings = model.model.multi_modal_projector(features)
    return Vision(embeddings, torch.arange(features.shape[1]).expand(len(features), -1))


@torch.no_grad()
def image_accuracy(staged: StagedTraining, model: LlavaForConditionalGeneration, held_out: SceneFeatures) -> Figures:
    """Exact match by question type on real patches of held-out scenes, without late-read."""
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
    """How long and how fast stage B learns."""

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
) -> Figures:
    """Train language model and projector on real patches, in place; returns the held-out figures."""
    rng = np.random.default_rng([seed, 4])

    def loss_of(_: int) -> Tensor:
        scenes, patches = features.take(rng.choice(len(features), phase.scenes_per_step, replace=False))
        vision = _see(model, patches)
        return answer_loss(staged, model, vision, draw_text(scenes, rng, 10, ALL_TYPES), rng)

    projector = model.model.multi_modal_projector.named_parameters(prefix="projector")
    optimiser = PairedOptimiser([*trained_in_language(model), *projector], phase.rates, phase.num_steps)
    optimiser.run("stage B", loss_of, lambda: image_accuracy(staged, model, held_out))
    return image_accuracy(staged, model, held_out)
