"""Qwen3.5, three of whose four layers are recurrent: a dropped row never enters the states behind its cut."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Answer, Engine, engine
from tests.families.asking import Question, ask, questions
from tests.families.checkpoints import CHECKPOINTS
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.verify.reference import shortened
from vllm_hidrop.verify.reference.attention import Heads, Kept, attention_weights
from vllm_hidrop.verify.reference.pruning import Pruning, View
from vllm_hidrop.verify.reference.shortened import Reference, Result

pytestmark = pytest.mark.engine

NUM_LAYERS = 12
SETTINGS = {"dtype": "bfloat16", "limit_mm_per_prompt": {"image": 3, "video": 1}, "skip_mm_profiling": True}
HIDROP = {"inject_layer": 3, "filter_layers": [3, 7], "keeps": [0.5, 0.25], "exit_layer": 10, "shape": [12, 64]}
"""Cuts under layers 3 and 7; images enter below a recurrent layer (2) and leave below one (9)."""
VISIPRUNER = {
    "parts": ["middle", "deep"],
    "shallow_layers": 2,
    "test_every": 4,
    "cosine": 1.0,
    "norm": 1.0,
    "shape": [12, 64],
}
MUSTDROP = {
    "global_threshold": 0.02,
    "individual_threshold": 0.05,
    "filter_layers": [3, 7],
    "merge_threshold": None,
    "key_rate": 0.0,
    "shape": [12, 64],
}
CHOICES: dict[str, dict[str, Any]] = {
    "fastv": {"method": "fastv"},
    "hidrop": {"method": "hidrop", "options": HIDROP},
    "visipruner": {"method": "visipruner", "options": VISIPRUNER},
    "mustdrop": {"method": "mustdrop", "options": MUSTDROP},
}


class Given(Pruning):
    """Keeps in every layer what it is given; from ``cut_from`` on generated tokens see what the last one kept."""

    def __init__(self, spans: list[torch.Tensor], kept: list[Kept], cut_from: int) -> None:
        super().__init__(spans)
        self.kept, self.cut_from = kept, cut_from

    def cached_in(self, layer: int) -> Kept:
        """Of what ``layer`` runs, what generated tokens see; a recurrent layer keeps what it has taken in."""
        return self.kept[-1] if layer >= self.cut_from else self.kept[layer]


class Masked(Pruning):
    """Lets dropped rows run on, unseen by attention: recurrent layers take them in."""

    def __init__(self, spans: list[torch.Tensor], kept: list[Kept]) -> None:
        super().__init__(spans)
        self.given = kept

    def weights(self, layer: int, heads: Heads, view: View) -> torch.Tensor:
        """Only what a row has kept, and itself."""
        hidden = torch.zeros(len(view.rows), dtype=torch.bool)
        for span, tokens in zip(view.spans, self.given[layer], strict=True):
            hidden[span] = True
            hidden[span[tokens]] = False
        mask = view.mask.masked_fill(hidden[None] & ~torch.eye(len(hidden), dtype=torch.bool), -torch.inf)
        return attention_weights(heads.query, heads.key, mask)


@dataclass
class Tiny:
    """A checkpoint, and what stock vLLM and the reference say to its questions."""

    name: str
    directory: Path

    def __post_init__(self) -> None:
        self.family = CHECKPOINTS[self.name]
        self.questions: list[Question] = questions(self.family)

    @cached_property
    def stock(self) -> list[Answer]:
        with engine(self.directory, None, **SETTINGS) as running:
            answers, self.expanded = ask(running, self.questions)
        return answers

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.directory)

    def spans(self, index: int) -> list[shortened.Span]:
        return self.questions[index].spans(self.expanded[index], num_frames=0)  # timestamps stand between frames

    def expected(self, index: int, pruning: Callable[[list[torch.Tensor]], Pruning], num_tokens: int = 1) -> Result:
        """The reference's answer."""
        question, expanded = self.questions[index], self.expanded[index]
        prepared = self.reference.prompt(expanded, question.images(), question.videos())
        with pytest.MonkeyPatch.context() as context:
            context.setattr(shortened, "pruning_of", lambda settings, spans, num_layers: pruning(spans))
            return self.reference.run(prepared, self.spans(index), num_tokens=num_tokens)


@pytest.fixture(scope="module")
def tinies(checkpoint: Callable[[str], Path]) -> Callable[[str], Tiny]:
    """By name."""
    return cache(lambda name: Tiny(name, checkpoint(name)))


def kept_by_layer(answer: Answer) -> list[Kept]:
    """The vision tokens that every layer ran, by the report."""
    stages = answer.report["stages"]
    return [stage["patches"] for stage in stages for _ in range(stage["first_layer"], stage["end_layer"])]


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations."""
    return float((ours - theirs).square().mean().sqrt() / theirs.std())


def same(ours: Answer, theirs: Answer) -> bool:
    return ours.token_ids == theirs.token_ids and torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize(("name", "method"), [*(("qwen3_5", method) for method in CHOICES), ("qwen3_5_moe", "fastv")])
def test_off_is_stock_and_dropped_rows_are_in_no_state(tinies: Callable[[str], Tiny], name: str, method: str) -> None:
    tiny = tinies(name)
    stock = tiny.stock
    with engine(tiny.directory, CHOICES[method], **SETTINGS) as running:
        for ours, theirs in zip(ask(running, tiny.questions, hidrop="off")[0], stock, strict=True):
            assert same(ours, theirs)
        pruned, _ = ask(running, tiny.questions, hidrop_explain=True)
        for index, answer in enumerate(pruned):
            check_pruned(tiny, index, answer, method)
        if method in ("fastv", "hidrop"):
            check_all_kept(running, tiny)


def check_pruned(tiny: Tiny, index: int, answer: Answer, method: str) -> None:
    """As near to the reference with the same kept tokens as the dense model is to it: first logits, and decoded ones.

    Where recurrent layers see the dropped rows, the reference says something else.
    """
    kept = kept_by_layer(answer)
    if not kept[0]:
        assert answer.report["mode"] == "text"
        assert same(answer, tiny.stock[index])
        return
    assert answer.report["mode"] == "pruned"
    assert answer.report["reuse_off"] == "recurrent"
    assert sum(map(len, kept[-1])) < sum(map(len, kept[3]))
    cut_from = 3 if method == "mustdrop" else NUM_LAYERS  # its first filter layer
    expected = tiny.expected(index, lambda spans: Given(spans, kept, cut_from), num_tokens=3)
    control = tiny.expected(index, lambda spans: Masked(spans, kept))
    usual = deviation(tiny.stock[index].logits[:1], tiny.expected(index, Pruning).logits)
    agreed = [a == b for a, b in zip(answer.token_ids, expected.token_ids, strict=False)]
    num_alike = next((i + 1 for i, is_same in enumerate(agreed) if not is_same), len(agreed))
    found = [deviation(answer.logits[i], expected.logits[i]) for i in range(num_alike)]
    unlike = deviation(answer.logits[:1], control.logits)
    print(f"{tiny.name} {method} {index}: {found}, dense {usual:.3f}, dropped rows in states {unlike:.3f}")
    assert max(found) < 3 * usual
    if method in ("fastv", "hidrop"):  # which drop half at least
        assert found[0] < 1.5 * usual
        assert unlike > 1.5 * found[0]


def check_all_kept(running: Engine, tiny: Tiny) -> None:
    """Everything kept but sent through the staged loop is stock's to the bit."""
    keeps = ["all"] * len(running.scheduler.planner.schedule.stages)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Plan, "is_pruned", property(lambda plan: bool(plan.spans)))
        answers, _ = ask(running, tiny.questions, hidrop_keep=keeps)
    assert {answer.report["mode"] for answer in answers} == {"pruned", "text"}
    assert all(same(ours, theirs) for ours, theirs in zip(answers, tiny.stock, strict=True))
