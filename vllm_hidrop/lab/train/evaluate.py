"""Held-out exact match of a checkpoint under its own schedule, and of what must be worse.

``python -m vllm_hidrop.lab.train.evaluate MODEL_DIR --scenes 100 --json FILE`` runs the checkpoint as Hugging Face
loads it through the training code's staged forward, one question of each type per scene. Probes: another scene's image,
and at every cut (a dense checkpoint's are ``DENSE_CUTS``) the worst vision tokens kept, or random ones.
"""

import argparse
import json
import platform
from collections.abc import Sequence
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

from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.lab.train.conversations import Sample, Turn
from vllm_hidrop.lab.train.decoder import Decoder
from vllm_hidrop.lab.train.llava_training import embed
from vllm_hidrop.lab.train.prompts import IGNORED, PromptEncoder
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, Question, ask
from vllm_hidrop.lab.train.rows import Rows, packed_starts
from vllm_hidrop.lab.train.scenes import NUM_PATCHES, UNSEEN_PAIRS, Pixels, held_out_seed, make_scene, render
from vllm_hidrop.lab.train.staged import StagedTraining
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.scoring import Scorer, Signals, attention_score, random_score
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Signal

FIRST_EVALUATED_SCENE = 10_000
"""Held-out scenes below this index were looked at while training."""
COUNT = "count"
DENSE_CUTS = (2, 3, 4, 6)
DENSE_KEEP = 96
Matches = dict[str, list[bool]]


def inverted_score(signals: Signals) -> Tensor:
    """Score that prefers the least attended tokens."""
    return -attention_score(signals)


def seeded_score(signals: Signals) -> Tensor:
    """Random score, the same for every request."""
    return random_score(signals, 0)


SELECTORS: dict[str, Scorer] = {"best": attention_score, "random": seeded_score, "worst": inverted_score}


@dataclass(frozen=True)
class Probe:
    """A schedule, and which tokens the cut at ``layer`` keeps; other cuts keep the best."""

    name: str
    schedule: Schedule
    layer: int | None = None
    selector: str = "best"

    def score(self, signals: Signals) -> Tensor:
        """The selector's score at ``layer``, attention at other layers."""
        return SELECTORS[self.selector if signals.layer == self.layer else "best"](signals)


def probes_of(schedule: Schedule) -> list[Probe]:
    """A probe per cut and wrong selector; a dense schedule gets single cuts with all selectors."""
    layers = [stage.first_layer for stage in schedule.stages if not (stage.keep.is_all or stage.keep.is_none)]
    if layers:
        wrong = [(layer, selector) for layer in layers for selector in SELECTORS if selector != "best"]
        return [Probe(f"own schedule, cut at layer {at}: {how}", schedule, at, how) for at, how in wrong]
    return [
        Probe(
            f"cut at layer {at}: {how} {DENSE_KEEP}",
            Schedule.of({0: "all", at: DENSE_KEEP}, schedule.num_layers),
            at,
            how,
        )
        for at in DENSE_CUTS
        if at < schedule.num_layers
        for how in SELECTORS
    ]


@dataclass(frozen=True)
class Example:
    """A held-out scene's image and one question of each type it allows."""

    seed: int
    image: Pixels
    questions: tuple[Question, ...]


def make_example(index: int) -> Example:
    """The evaluation example of an index, always the same."""
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
        config: Any = self.model.config
        shape = ModelShape(config.text_config.num_hidden_layers, config.image_seq_length)
        resolved = resolve(HidropConfig.parse({}), shape, getattr(config, "hidrop", None))
        self.schedule, self.method, self.positions = resolved.schedule, resolved.method, resolved.positions
        self.own = Probe("own schedule", self.schedule)
        self.encoder = PromptEncoder(
            self.processor,
            config.image_token_index,
            config.image_seq_length,
            config.text_config.max_position_embeddings,
        )

    def staged(self, schedule: Schedule, signal: Signal, scorer: Scorer) -> StagedTraining:
        """The decoder under a schedule, with the checkpoint's own positions."""
        llm = self.model.model.language_model
        return StagedTraining(Decoder(llm), schedule, signal, scorer, position_scheme=self.positions)

    def _inputs(self, image: Pixels, question: str) -> Any:
        text = self.encoder.render((Turn("user", question, 1),), prompts_answer=True)
        return self.processor(images=Image.fromarray(image), text=text, return_tensors="pt")

    @torch.no_grad()
    def generate(self, image: Pixels, question: str) -> str:
        """The answer text, decoded greedily by Hugging Face's ``generate``, which prunes nothing."""
        inputs = self._inputs(image, question)
        output = self.model.generate(**inputs, max_new_tokens=8)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(answer, skip_special_tokens=True))

    @torch.no_grad()
    def answer(self, image: Pixels, question: str, max_tokens: int = 8) -> str:
        """The answer text under the own schedule, decoded greedily by the staged forward: no cache, no vLLM."""
        inputs = self._inputs(image, question)
        ids = inputs["input_ids"][0]
        num_prompt = len(ids)
        embeddings = embed(self.model, ids, self._rows_of(ids, num_prompt).images, inputs["pixel_values"])
        staged = self.staged(self.schedule, self.method.signal, self.method.score)
        while len(ids) < num_prompt + max_tokens:
            hidden = staged(embeddings, self._rows_of(ids, num_prompt)).hidden
            token = self.model.lm_head(hidden[-1:]).argmax(-1)
            if int(token) == self.processor.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token])
            embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(token)])
        return str(self.processor.decode(ids[num_prompt:], skip_special_tokens=True)).strip()

    def _rows_of(self, ids: Tensor, num_prompt: int) -> Rows:
        """The rows of one sequence whose first ``num_prompt`` tokens are the prompt."""
        positions = torch.arange(len(ids))
        images = torch.where(ids == self.model.config.image_token_index, 0, -1)
        return Rows(positions, images, positions == num_prompt - 1, packed_starts([len(ids)]))

    def is_right(self, image: Pixels, questions: Sequence[Question], probe: Probe | None = None) -> list[bool]:
        """Whether greedy decoding gives each answer exactly, its end included; ``None`` is the own schedule."""
        return self.are_right(image, questions, [probe or self.own])[0]

    @torch.no_grad()
    def are_right(self, image: Pixels, questions: Sequence[Question], probes: Sequence[Probe]) -> list[list[bool]]:
        """By probe, whether each answer is right; teacher forcing makes this the same as greedy decoding."""
        picture = Image.fromarray(image)
        turns = [(Turn("user", one.text, 1), Turn("assistant", one.answer)) for one in questions]
        batch = self.encoder.collate([Sample(each, (picture,)) for each in turns])
        embeds = embed(self.model, batch.input_ids, batch.images, batch.pixel_values)
        found: list[list[bool]] = []
        for probe in probes:
            output = self.staged(probe.schedule, Signal.NEXT_ATTENTION, probe.score)(embeds, batch.rows())
            predicted = self.model.lm_head(output.hidden).argmax(-1)
            targets = batch.targets[output.places]
            is_wrong = (targets != IGNORED) & (predicted != targets)
            found.append([not one.any() for one in is_wrong.split(output.row_starts.diff().tolist())])
        return found


def _add(matches: Matches, questions: Sequence[Question], is_right: Sequence[bool]) -> None:
    for question, right in zip(questions, is_right, strict=True):
        matches.setdefault(question.type, []).append(right)


def is_about_an_unseen_pair(question: Question) -> bool:
    """Whether question and answer name a kind and a colour that never meet in training."""
    words = {*question.text.split(), *question.answer.split()}
    return question.type in ("colour", "object") and any(words >= {*pair} for pair in UNSEEN_PAIRS)


def summarise(matches: Matches) -> dict[str, float]:
    """Exact match by type, over all questions but type ``count``, and over all."""
    counted = [right for rights in matches.values() for right in rights]
    others = [right for name, rights in matches.items() if name != COUNT for right in rights]
    figures = {**matches, "without_count": others, "all": counted}
    return {name: round(sum(rights) / max(1, len(rights)), 4) for name, rights in figures.items()}


def evaluate(checkpoint: Checkpoint, num_scenes: int, probes: Sequence[Probe]) -> dict[str, Any]:
    """All figures of one checkpoint as JSON data."""
    whole: Matches = {}
    wrong_image: Matches = {}
    unseen: list[bool] = []
    probed: list[Matches] = [{} for _ in probes]
    previous = make_example(num_scenes).image
    for index in tqdm(range(num_scenes), desc="scenes", mininterval=5):
        example = make_example(index)
        asked = example.questions
        right, *under_probes = checkpoint.are_right(example.image, asked, [checkpoint.own, *probes])
        _add(whole, asked, right)
        unseen += [one for question, one in zip(asked, right, strict=True) if is_about_an_unseen_pair(question)]
        _add(wrong_image, asked, checkpoint.is_right(previous, asked))
        for under, matches in zip(under_probes, probed, strict=True):
            _add(matches, asked, under)
        previous = example.image
    return {
        "num_scenes": num_scenes,
        "num_questions": sum(len(rights) for rights in whole.values()),
        "mean_vision_tokens": checkpoint.schedule.mean_kept(NUM_PATCHES),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
        "own": summarise(whole),
        "unseen_pairs": {"num_questions": len(unseen), "right": round(sum(unseen) / max(1, len(unseen)), 4)},
        "wrong_image": summarise(wrong_image),
        "probes": [
            {"name": probe.name, "layer": probe.layer, "selector": probe.selector} | summarise(matches)
            for probe, matches in zip(probes, probed, strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Held-out exact match, own schedule and probes.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint(options.model_dir)
    figures = evaluate(checkpoint, options.scenes, probes_of(checkpoint.schedule))
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
