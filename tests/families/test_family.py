"""Every family, every method: off is stock vLLM, pruned is the reference on Hugging Face modules, blocks the plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoVideoProcessor

from tests.engine.harness import Answer, Engine, engine
from tests.engine.test_blocks import count_preemptions, record_chunks
from tests.engine.test_prefix import budget
from tests.families.asking import NUM_TOKENS, Question, ask, questions, settings
from tests.families.checkpoints import CHECKPOINTS
from tests.families.test_checkpoints import with_image_tokens
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.verify.reference.mustdrop import MustDropResult
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.pruning import Settings, StagedSettings
from vllm_hidrop.verify.reference.shortened import Prepared, Reference, Result
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.reference.visipruner import VisiPrunerSettings

pytestmark = pytest.mark.engine

TOLERANCE = 2e-4
BLOCK_SIZE = 32
HYBRIDS = ("qwen3_5", "qwen3_5_moe")
"""Their own tests are in ``test_hybrid.py``."""
IN_PAIRS = ("qwen2_vl", "qwen2_5_vl")
"""Where two frames of a video are one, and the expanded prompt does not show it."""

HIDROP = {"inject_layer": 3, "filter_layers": [4, 5], "keeps": [0.5, 0.25], "exit_layer": 7, "shape": [8, 64]}
VISIPRUNER = {"shallow_layers": 1, "cosine": 0.97, "norm": 0.6, "exit_cosine": 0.9, "shape": [8, 64]}
WITH_NORMED_HEADS = {"visipruner": {"cosine": 0.995, "norm": 0.3}, "mustdrop": {"individual_threshold": 0.06}}
"""Where queries and keys are normed, attention is flatter."""
NORMED_HEADS = ("qwen3_vl", "qwen3_vl_moe", "internvl", "internvl_chat")
MUSTDROP = {
    "global_threshold": 0.0207,
    "individual_threshold": 0.05,
    "filter_layers": [1, 3, 5],
    "merge_threshold": None,
    "key_rate": 0.0,
    "shape": [8, 64],
}
CHOICES: dict[str, dict[str, Any]] = {
    "fastv": {"method": "fastv"},
    "pyramiddrop": {"method": "pyramiddrop"},
    "hidrop": {"method": "hidrop", "options": HIDROP},
    "visipruner": {"method": "visipruner", "options": VISIPRUNER},
    "mustdrop": {"method": "mustdrop", "options": MUSTDROP},
}
STAGES: dict[str, tuple[Rule, list[tuple[int, float]]]] = {
    "fastv": ("attention_previous", [(0, 1), (2, 0.5)]),
    "pyramiddrop": ("attention_next", [(0, 1), (2, 0.5), (4, 0.25), (6, 0.125)]),
    "hidrop": ("attention_next", [(0, 0), (2, 1), (4, 0.5), (5, 0.25), (6, 0)]),
}
"""The rule, and first layer and share of every stage."""


def choice_of(method: str, family: str) -> dict[str, Any]:
    """What the server is started with."""
    own = WITH_NORMED_HEADS.get(method, {}) if family in NORMED_HEADS else {}
    chosen = CHOICES[method]
    return chosen | ({"options": chosen["options"] | own} if own else {})


def reference_settings(method: str, options: Mapping[str, Any], sizes: list[int]) -> Settings:
    """The same for the reference, given spans of these sizes."""
    if method in STAGES:
        rule, stages = STAGES[method]
        return StagedSettings([OracleStage(at, tuple(int(share * n) for n in sizes)) for at, share in stages], rule)
    cls: Any = VisiPrunerSettings if method == "visipruner" else MustDropSettings
    known = {field.name for field in fields(cls)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    settings: Settings = cls(**{key: value for key, value in values.items() if key in known})
    return settings


@dataclass
class Tiny:
    """A family's checkpoint, and what stock vLLM and the reference say to its questions."""

    name: str
    directory: Path

    def __post_init__(self) -> None:
        self.family = CHECKPOINTS[self.name]
        self.questions: list[Question] = questions(self.family)
        self.settings = settings(self.family)

    @cached_property
    def stock(self) -> list[Answer]:
        with engine(self.directory, None, **self.settings) as running:
            answers, self.expanded = ask(running, self.questions)
        return answers

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.family.reference(self.directory))

    def spans(self, index: int) -> list[tuple[int, int]]:
        num_frames = 0 if self.family.video_shape is None else self.family.video_shape.num_frames
        return self.questions[index].spans(self.expanded[index], num_frames // (2 if self.name in IN_PAIRS else 1))

    def _prepared(self, question: Question, token_ids: list[int]) -> Prepared:
        token_ids = with_image_tokens(self.family, token_ids)
        if self.name.startswith("internvl") and question.videos():  # frames are images to Hugging Face's model
            processor = AutoVideoProcessor.from_pretrained(self.family.reference(self.directory))
            videos = processor(videos=question.videos(), do_sample_frames=False, return_tensors="pt")
            frames = {"pixel_values": videos["pixel_values_videos"].flatten(0, 1)}
            return self.reference.prepared(token_ids, frames)
        if self.family.is_remote_code and question.images():
            pictures = self.family.image_processor(self.directory)(question.images(), return_tensors="pt")
            return self.reference.prepared(token_ids, pictures)
        return self.reference.prompt(token_ids, question.images(), question.videos())

    def expected(self, index: int, method: str | None) -> Result:
        """The reference's answer to a question; None: dense."""
        question, spans = self.questions[index], self.spans(index)
        prepared = self._prepared(question, self.expanded[index])
        sizes = [end - first for first, end in spans]
        options = choice_of(method, self.name).get("options", {}) if method else {}
        chosen = reference_settings(method, options, sizes) if method else None
        return self.reference.run(prepared, spans, chosen, NUM_TOKENS)


@pytest.fixture(scope="module", params=[name for name in CHECKPOINTS if name not in HYBRIDS])
def tiny(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Tiny:
    return Tiny(request.param, checkpoint(request.param))


def same(ours: Answer, theirs: Answer) -> bool:
    return ours.token_ids == theirs.token_ids and torch.equal(ours.logits, theirs.logits)


def close(ours: Answer | Result, theirs: Answer | Result | MustDropResult, tolerance: float = TOLERANCE) -> bool:
    return ours.token_ids == theirs.token_ids and torch.allclose(ours.logits, theirs.logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", CHOICES)
def test_pruned_is_the_reference_and_off_is_stock(tiny: Tiny, method: str) -> None:
    stock = tiny.stock
    cuts: set[bool] = set()
    with engine(tiny.directory, choice_of(method, tiny.name), **tiny.settings) as running:
        off, _ = ask(running, tiny.questions, hidrop="off")
        assert all(map(same, off, stock))
        pruned, _ = ask(running, tiny.questions, hidrop_explain=True)
        warm, _ = ask(running, tiny.questions, hidrop_explain=True)
        for index, (cold, again) in enumerate(zip(pruned, warm, strict=True)):
            assert close(cold, again)
            if not tiny.spans(index):
                assert close(cold, stock[index])
                continue
            assert bool(again.cached_tokens) == (method in STAGES)
            theirs = tiny.expected(index, method)
            check_pruned(cold, theirs)
            if method in STAGES:
                check_blocks(cold, theirs, len(tiny.expanded[index]), running)
            cuts |= {len(tokens) < len(whole) for tokens, whole in zip(theirs.kept[-2], theirs.kept[0], strict=True)}
        assert True in cuts or method == "hidrop", "nothing was dropped: nothing was tested"
        if method == "hidrop":
            check_all_kept(running, tiny)


def check_pruned(ours: Answer, theirs: Result | MustDropResult) -> None:
    """The same tokens kept in every layer, the same logits and answer; a method that drops nothing shows nothing."""
    assert ours.report["mode"] == "pruned"
    for stage in ours.report["stages"]:
        layer = stage["first_layer"]
        assert stage["patches"] == theirs.kept[layer], f"in layer {layer}"
    assert min(theirs.margins.values(), default=1) > 1e-6, "a decision that rounding could turn"
    assert close(ours, theirs)


def check_blocks(ours: Answer, theirs: Result, num_prompt: int, running: Engine) -> None:
    """A stage's KV groups hold the text, what the stage keeps, and the generated tokens but the last."""
    groups = [group.kv_cache_spec.stage for group in running.scheduler.kv_cache_config.kv_cache_groups]
    num_vision = max(sum(map(len, layer)) for layer in theirs.kept)
    for index, stage in enumerate(ours.report["stages"]):
        kept = sum(map(len, theirs.kept[stage["first_layer"]]))
        num_slots = num_prompt - num_vision + kept + NUM_TOKENS - 1
        assert stage["kv_blocks"] == groups.count(index) * -(-num_slots // BLOCK_SIZE)


def check_all_kept(running: Engine, tiny: Tiny) -> None:
    """Everything kept but sent through the staged loop is stock's, to the bit where layers are called whole."""
    running.llm.reset_prefix_cache()
    keeps = ["all"] * len(running.scheduler.planner.schedule.stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "is_pruned", property(lambda plan: bool(plan.spans)))
        answers, _ = ask(running, tiny.questions, hidrop_keep=keeps)
    is_whole = running.runner.model.decoder.form is Form.BLACK_BOX
    for ours, theirs in zip(answers, tiny.stock, strict=True):
        assert ours.report["mode"] in ("pruned", "text")
        assert close(ours, theirs, 0 if is_whole else TOLERANCE)


@pytest.mark.parametrize(("name", "method"), [("qwen2_5_vl", "fastv"), ("qwen3_vl", "hidrop"), ("glm4v", "fastv")])
def test_preemption_and_chunked_text_change_nothing(name: str, method: str, checkpoint: Callable[[str], Path]) -> None:
    family = CHECKPOINTS[name]
    sizes = family.image_sizes[1::-1]
    asked = [Question(family, layout, sizes, seed) for seed, layout in enumerate(("9" * 12 + "i3i4", "2i3i4") * 2)]
    with engine(checkpoint(name), CHOICES[method], **settings(family)) as roomy:
        expected = [ask(roomy, [question], num_tokens=60)[0][0] for question in asked]
    tight = {"num_gpu_blocks_override": 70, "max_model_len": 256, "max_num_batched_tokens": 256}
    with engine(checkpoint(name), CHOICES[method], **settings(family) | tight) as running:
        preempted, chunks = count_preemptions(running), record_chunks(running)
        with budget(running, 110):
            answers, _ = ask(running, asked, num_tokens=60)
    assert preempted, "the pool was large enough: nothing was tested"
    assert any(first == 0 and 1 < count < 82 for _, first, count in chunks), "no prefix was split"
    for ours, theirs in zip(answers, expected, strict=True):
        assert close(ours, theirs)
