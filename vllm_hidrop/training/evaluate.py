"""Held-out exact match of a checkpoint, whole and cut.

``python -m vllm_hidrop.training.evaluate MODEL_DIR --scenes 100 --json FILE``. Runs the
checkpoint as Hugging Face loads it, one question of each type per scene. Probes: another scene's
image, and cuts that keep a few vision tokens by attention, at random, or the worst ones.
"""

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vllm_hidrop.training.probes import SELECTORS, Cut, PromptRows, cut_applied
from vllm_hidrop.training.questions import QUESTION_TYPES, Question, ask
from vllm_hidrop.training.scenes import Pixels, held_out_seed, make_scene, render

FIRST_EVALUATED_SCENE = 10_000
"""Held-out scenes below this index were looked at while training."""
COUNT = "count"
Matches = dict[str, list[bool]]


@dataclass(frozen=True)
class Example:
    """A held-out scene's image and one question of each type it allows."""

    seed: int
    image: Pixels
    questions: tuple[Question, ...]


def make_example(index: int) -> Example:
    """The ``index``-th evaluation example; the same for the same index."""
    seed = held_out_seed(FIRST_EVALUATED_SCENE + index)
    scene, rng = make_scene(seed), np.random.default_rng([seed, 5])
    drawn = [ask(scene, name, rng) for name in QUESTION_TYPES]
    return Example(seed, render(scene), tuple(one for one in drawn if one is not None))


class Checkpoint:
    """A checkpoint directory loaded with Hugging Face in float32."""

    def __init__(self, directory: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(directory)

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return str(rendered)

    @torch.no_grad()
    def generate(self, image: Pixels, question: str) -> str:
        """The answer text, decoded greedily by ``generate``."""
        inputs = self.processor(images=Image.fromarray(image), text=self._prompt(question), return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=8)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(answer, skip_special_tokens=True))

    def _embed(self, ids: Tensor, image: Image.Image) -> Tensor:
        """Input embeddings [B, N, D] of prompts that all show ``image``."""
        pixel_values = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tower = self.model.model.vision_tower(pixel_values, output_hidden_states=True)
        layer = self.model.config.vision_feature_layer
        features = self.model.model.multi_modal_projector(tower.hidden_states[layer][:, 1:])
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        is_image = (ids == self.model.config.image_token_index).unsqueeze(-1)
        repeated = features.expand(len(ids), -1, -1)
        return embeddings.masked_scatter(is_image, repeated)

    @torch.no_grad()
    def is_right(
        self, image: Pixels, questions: Sequence[Question], cut: Cut | None = None, seed: int = 0
    ) -> list[bool]:
        """Whether greedy decoding gives each answer exactly, its end included."""
        picture = Image.fromarray(image)
        eos = self.processor.tokenizer.eos_token
        prompts = [self._prompt(question.text) for question in questions]
        texts = [f"{prompt}{one.answer}{eos}" for prompt, one in zip(prompts, questions, strict=True)]
        batch = self.processor(images=[picture] * len(texts), text=texts, return_tensors="pt", padding=True)
        ids, present = batch["input_ids"], batch["attention_mask"]
        num_answer = [len(self.processor.tokenizer(one.answer).input_ids) + 1 for one in questions]
        starts = present.sum(1) - torch.tensor(num_answer)
        vision = (ids[0] == self.model.config.image_token_index).nonzero().flatten()
        rows = PromptRows(int(vision[0]), int(vision[-1]) + 1, starts - 1)
        llm = self.model.model.language_model
        with cut_applied(llm, cut, rows, seed):
            states = llm(inputs_embeds=self._embed(ids, picture), use_cache=False)
        predicted = self.model.lm_head(states.last_hidden_state).argmax(-1)
        return [
            torch.equal(ids[row, start : start + size], guess[start - 1 : start + size - 1])
            for row, (start, size, guess) in enumerate(zip(starts.tolist(), num_answer, predicted, strict=True))
        ]


def _add(matches: Matches, questions: Sequence[Question], is_right: Sequence[bool]) -> None:
    for question, right in zip(questions, is_right, strict=True):
        matches.setdefault(question.type, []).append(right)


def summarise(matches: Matches) -> dict[str, float]:
    """Exact match by type, over all questions but count, and over all."""
    counted = [right for rights in matches.values() for right in rights]
    others = [right for name, rights in matches.items() if name != COUNT for right in rights]
    figures = {**matches, "without_count": others, "all": counted}
    return {name: round(sum(rights) / max(1, len(rights)), 4) for name, rights in figures.items()}


def _probe_cuts(first_layers: Sequence[int], num_kept: Sequence[int]) -> Iterator[Cut]:
    for first_layer in first_layers:
        for kept in num_kept:
            for selector in SELECTORS:
                yield Cut(first_layer, kept, selector)


def evaluate(
    checkpoint: Checkpoint, num_scenes: int, first_layers: Sequence[int], num_kept: Sequence[int]
) -> dict[str, Any]:
    """All figures of one checkpoint as one JSON-ready dictionary."""
    cuts = list(_probe_cuts(first_layers, num_kept))
    whole: Matches = {}
    wrong_image: Matches = {}
    cut_matches: list[Matches] = [{} for _ in cuts]
    previous = make_example(num_scenes).image
    for index in tqdm(range(num_scenes), desc="scenes", mininterval=5):
        example = make_example(index)
        asked = example.questions
        _add(whole, asked, checkpoint.is_right(example.image, asked))
        _add(wrong_image, asked, checkpoint.is_right(previous, asked))
        for cut, matches in zip(cuts, cut_matches, strict=True):
            _add(matches, asked, checkpoint.is_right(example.image, asked, cut, index))
        previous = example.image
    return {
        "num_scenes": num_scenes,
        "num_questions": sum(len(rights) for rights in whole.values()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
        "full": summarise(whole),
        "wrong_image": summarise(wrong_image),
        "cuts": [
            {"first_layer": cut.first_layer, "num_kept": cut.num_kept, "selector": cut.selector} | summarise(matches)
            for cut, matches in zip(cuts, cut_matches, strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Held-out exact match, whole and cut.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first-layers", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--keep", type=int, nargs="*", default=[16])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint(options.model_dir)
    figures = evaluate(checkpoint, options.scenes, options.first_layers, options.keep)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
