"""Answering: one image, many questions, one loss. Knows not where the vision tokens come from.

Axes as in ``batches.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.train.batches import IGNORED, TextBatch, pack_questions, random_words
from vllm_hidrop.lab.train.prefix_llm import LateRead, Prefix, SharedImage
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, draw_questions
from vllm_hidrop.lab.train.scenes import NUM_PATCHES, Scene
from vllm_hidrop.lab.train.staged import StagedTraining
from vllm_hidrop.lab.train.vocabulary import BOS, SYSTEM, TOKEN_IDS, USER
from vllm_hidrop.plan.positions import PositionScheme

FIRST_READING_LAYER = 3
SYSTEM_FRACTION = 0.12
MAX_SYSTEM_WORDS = 12
ALL_TYPES = tuple(QUESTION_TYPES)
ONE_HOP_TYPES = ("colour", "object", "where", "exist", "read")


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
    """Mean cross-entropy of the answers with late-read training, a scalar; at least 2 scenes."""
    late = LateRead(FIRST_READING_LAYER, int(rng.integers(1, len(vision.patches))))
    logits = answer_logits(staged, model, vision, text, rng, late)
    return F.cross_entropy(logits.flatten(0, 1), text.targets.flatten(), ignore_index=IGNORED)


def accuracies(matches: dict[str, list[bool]]) -> dict[str, float]:
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
