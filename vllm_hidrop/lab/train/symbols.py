"""Stage S: the language model learns to answer about symbolic scenes. Knows no pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.lab.train.batches import SymbolBatch, exact_matches, make_symbols
from vllm_hidrop.lab.train.initial import EMBEDDING_STD, shared_part
from vllm_hidrop.lab.train.language import (
    Vision,
    accuracies,
    answer_logits,
    answer_loss,
    draw_text,
    trained_in_language,
)
from vllm_hidrop.lab.train.model import HIDDEN_SIZE
from vllm_hidrop.lab.train.optimiser import LearningRates, PairedOptimiser
from vllm_hidrop.lab.train.scenes import held_out_seed, make_scene
from vllm_hidrop.lab.train.schedules import DENSE, LATE_INJECTION, with_schedule
from vllm_hidrop.lab.train.vocabulary import PAD, TOKEN_IDS


class SymbolEmbedding(nn.Module):
    """Embeds a symbolic vision token: the sum of its words and its centre, or background.

    The offset takes out of each word what marks it as text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_centre = nn.Parameter(torch.randn(2, HIDDEN_SIZE) * 2 * EMBEDDING_STD)
        self.embed_background = nn.Parameter(torch.randn(HIDDEN_SIZE) * EMBEDDING_STD)
        self.embed_offset = nn.Parameter(-shared_part(HIDDEN_SIZE))

    def forward(self, embed_tokens: nn.Module, words: Tensor, centres: Tensor, is_background: Tensor) -> Tensor:
        """[..., V, D] from words [..., V, W], centres [..., V, 2], is_background [..., V]."""
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
) -> dict[str, float]:
    """Held-out exact match of the dense model by question type on symbolic scenes."""
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
) -> dict[str, float]:
    """One phase of stage S, in place; returns the held-out figures.

    Every other step injects late, so that the language model is a base for dense and HiDrop training alike.
    """
    named = [*trained_in_language(model), *symbols.named_parameters()]
    optimiser = PairedOptimiser(named, phase.rates, phase.num_steps)
    rng = np.random.default_rng([seed, phase.num_tokens])
    forwards = with_schedule(model, DENSE), with_schedule(model, LATE_INJECTION)
    progress = trange(phase.num_steps, desc=f"stage S {phase.num_tokens}", mininterval=5)
    for step in progress:
        scenes = [make_scene(int(at)) for at in rng.integers(0, 2**29, scenes_per_step)]
        batch = make_symbols(scenes, phase.num_tokens, rng)
        text = draw_text(scenes, rng, 8, phase.types)
        loss = answer_loss(forwards[step % 2], model, _embed_symbols(model, symbols, batch), text, rng)
        optimiser.step(loss)
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 100 == 99:
            progress.write(f"step {step}: {symbol_accuracy(model, symbols, phase, 64)}")
    return symbol_accuracy(model, symbols, phase)
