"""Qwen3.5, three of whose four layers are recurrent: a dropped row never enters the states behind its cut."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from vllm.engine.arg_utils import EngineArgs

from tests.engine.harness import Answer, Ask, Engine, engine
from tests.families.asking import Question, ask, questions
from tests.families.checkpoints import CHECKPOINTS, form, qwen
from vllm_hidrop.engine.kv_cache import StageManager
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.planner import Planner
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


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def tiny(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Tiny:
    return Tiny(request.param, checkpoint(request.param))


def kept_by_layer(answer: Answer) -> list[Kept]:
    """The vision tokens that every layer ran, by the report."""
    stages = answer.report["stages"]
    return [stage["patches"] for stage in stages for _ in range(stage["first_layer"], stage["end_layer"])]


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations."""
    return float((ours - theirs).square().mean().sqrt() / theirs.std())


def same(ours: Answer, theirs: Answer) -> bool:
    return ours.token_ids == theirs.token_ids and torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("method", CHOICES)
def test_off_is_stock_and_dropped_rows_are_in_no_state(tiny: Tiny, method: str) -> None:
    if tiny.name == "qwen3_5_moe" and method != "fastv":
        pytest.skip("experts do not know the method")
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


# Blocks: a checkpoint whose keys are wide, so that a block, which is as large as a state, has few tokens.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks have 96 tokens: a state 136 KB, a token's keys and values in one layer 2 KB."""
    rope = qwen.rope([6, 5, 5], mrope_interleaved=True, partial_rotary_factor=0.25)
    changed = {"num_key_value_heads": 4, "head_dim": 128, "linear_num_value_heads": 2, "rope_parameters": rope}
    text = qwen.hybrid_text() | changed
    config = Qwen3_5Config(text_config=text, vision_config=qwen.qwen3_vision(), **qwen.token_ids())
    directory = tmp_path_factory.mktemp("wide")
    form.save(directory, Qwen3_5ForConditionalGeneration, config, qwen.hybrid_processor(), "bfloat16")
    return directory


def asked(layout: str, seed: int, max_tokens: int) -> Ask:
    """Every image has 64 tokens."""
    tokens, images = CHECKPOINTS["qwen3_5"].prompt(layout, seed), layout.count("i")
    sizes = ((128, 128),) * images
    return Ask(tuple(tokens), tuple(range(10 * seed, 10 * seed + images)), {}, max_tokens, sizes)


def blocks_held(running: Engine, request_id: str) -> tuple[dict[int, int], int]:
    """By stage, the blocks of its layers with attention; and the states."""
    of_stage: dict[int, int] = {}
    num_states = 0
    for manager in running.scheduler.kv_cache_manager.coordinator.single_type_managers:
        held = len(manager.req_to_blocks.get(request_id, ()))
        if isinstance(manager, StageManager):
            stage = manager.kv_cache_spec.stage
            of_stage[stage] = of_stage.get(stage, 0) + held
        else:
            num_states += held
    return of_stage, num_states


def test_blocks_are_the_plans_and_a_state_is_one_block(wide: Path) -> None:
    with engine(wide, CHOICES["hidrop"], **SETTINGS) as running:
        size = running.scheduler.planner.block_size
        assert size == 96
        running.add("a", asked("4iii5", 1, 40))
        running.add("b", asked("9", 2, 3))
        num_text, num_vision = 1 + 4 + 5 + 6, 192
        reports = []
        for step in range(40):
            ended = [output for output in running.step() if output.finished]
            reports += [(output.kv_transfer_params or {})["hidrop"] for output in ended]
            request_id = next((key for key in running.scheduler.requests if key.startswith("a")), None)
            if request_id is None:
                break
            # Layers 3, 7 and 11 attend, in stages 2 to 4; 0 and 1 are recurrent alone.
            tokens = {2: num_text + step + num_vision // 2, 3: num_text + step + num_vision // 4, 4: num_text + step}
            expected = {stage: -(-n // size) for stage, n in tokens.items()}
            assert blocks_held(running, request_id) == (expected, 9), f"step {step}"
            assert running.scheduler.check_integrity() == []
        text, pruned = reports
        page = running.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
        for report, blocks in ((text, [0, 0, 1, 1, 1]), (pruned, [0, 0, 2, 2, 1])):
            assert [stage["kv_blocks"] for stage in report["stages"]] == blocks
            assert report["kv_bytes"] == sum(blocks) * page
            assert report["state_bytes"] == 9 * page
        assert pruned["kv_blocks_dense"] == 3 * 3
        assert pruned["kv_bytes_dense"] == 9 * page


def test_two_requests_in_one_batch_answer_as_each_alone(wide: Path) -> None:
    asks = [asked("4i5", 1, 8), asked("2ii4", 2, 8)]
    with engine(wide, CHOICES["fastv"], **SETTINGS) as running:
        alone = [running.ask([each])[0] for each in asks]
        together = running.ask(asks)
    assert all(deviation(a.logits, b.logits) < 0.05 for a, b in zip(together, alone, strict=True))
    assert deviation(alone[0].logits, alone[1].logits) > 0.5


def test_preempted_and_aborted_requests_give_every_block_back(wide: Path) -> None:
    asks = [asked("4iii5", 1, 100), asked("6iii4", 2, 100)]
    with engine(wide, CHOICES["hidrop"], **SETTINGS, max_model_len=384, num_gpu_blocks_override=29) as running:
        alone = [running.ask([each])[0] for each in asks]
        with patch.object(running.scheduler, "_preempt_request", wraps=running.scheduler._preempt_request) as preempt:
            together = running.ask(asks)
        assert preempt.call_count
        for ours, theirs in zip(together, alone, strict=True):
            # Behind a preemption many tokens are computed at once, which rounds otherwise; one day another token wins.
            alike = [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
            num_alike = alike.index(False) if False in alike else len(alike)
            assert num_alike >= 80
            assert deviation(ours.logits[: num_alike + 1], theirs.logits[: num_alike + 1]) < 0.1
        running.check_pool_is_whole()
        for index, each in enumerate(asks):
            running.add(f"gone{index}", each)
        for _ in range(5):
            running.step()
        running.llm.llm_engine.abort_request(["gone0", "gone1"])
        running.step()


# What is refused, and what is moved.


def configured(model: Path, hidrop: dict[str, Any], **settings: Any) -> Any:
    overrides = {"architectures": ["HidropQwen3_5ForConditionalGeneration"]}
    arguments = {"hf_overrides": overrides, "additional_config": {"hidrop": hidrop}, "enforce_eager": True}
    return EngineArgs(model=str(model), **(arguments | settings)).create_engine_config()


@pytest.mark.parametrize(
    ("hidrop", "message"),
    [
        ({"method": "fastv", "options": {"layer": 2}}, r"cut at layer 2 is scored under layer 1.*cuts: layers 4, 8"),
        (
            {"method": "hidrop", "options": {"scale": True}},
            r"cut at layer 4 is scored under layer 4, which has no attention.*cuts: layers 3, 7, 11",
        ),
        ({"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5, 0.75]}}, r"cut at layer 6 .* layers 3, 7, 11"),
        ({"method": "mustdrop", "options": MUSTDROP | {"filter_layers": [3, 5]}}, r"cut at layer 6.*: layers 4, 8"),
        ({"method": "visipruner", "options": VISIPRUNER | {"test_every": 1}}, r"cut at layer 5 .*: layers 4, 8"),
        (
            {"method": "visipruner", "options": VISIPRUNER | {"parts": ["shallow", "middle", "deep"]}},
            r"edits the attention of layers 0, 1, which have none in this model; usable: layers 3, 7, 11",
        ),
        ({"method": "hidrop", "options": HIDROP, "positions": "compacted"}, "need decoder layers of the standard form"),
    ],
)
def test_a_cut_that_cannot_be_scored_is_refused_with_the_layers_that_can(
    wide: Path, hidrop: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configured(wide, hidrop)


@pytest.mark.parametrize(
    ("method", "layers", "options"),
    [("fastv", [0, 4], {"layer": 4}), ("pyramiddrop", [0, 3, 7, 11], {"cuts": (3 / 12, 7 / 12, 11 / 12)})],
)
def test_published_cuts_move_to_layers_with_attention_and_it_is_said(
    wide: Path, monkeypatch: pytest.MonkeyPatch, method: str, layers: list[int], options: dict[str, Any]
) -> None:
    told: list[str] = []
    monkeypatch.setattr("vllm_hidrop.engine.configure.logger.info", lambda text, *args: told.append(text % args))
    config = configured(wide, {"method": method}, enable_prefix_caching=True)
    planner = Planner.from_vllm_config(config)
    assert [stage.first_layer for stage in planner.schedule.stages] == layers
    assert config.additional_config["hidrop"]["resolved"]["options"] == options
    assert any(f"moved to {next(iter(options))}" in line for line in told)
    assert any("Prefix caching and the reuse of images are off" in line for line in told)
    assert config.cache_config.enable_prefix_caching is False


def test_a_server_that_never_prunes_caches_as_stock_does(wide: Path) -> None:
    assert configured(wide, {"method": "none"}, enable_prefix_caching=True).cache_config.enable_prefix_caching


def test_requests_cannot_choose_tokens_where_nothing_scores_them(wide: Path) -> None:
    """Methods that cannot are no alternatives; those that can may keep 0 or all anywhere."""
    planner = Planner.from_vllm_config(configured(wide, CHOICES["hidrop"]))
    assert "fastv" not in planner.methods
    spans = [Span(4, 64)]
    assert planner.plan(80, spans, {"hidrop_keep": [0, 0, "all", 8, 0]}).is_pruned
    for keeps, stage, layer in (([0, "all", 32, 16, 8], 4, 9), ([32, 32, 16, 16, 0], 0, 0)):
        message = f"on entry to stage {stage} under layer {layer}, which has no attention .* choose: 2, 3$"
        with pytest.raises(ValueError, match=message):
            planner.plan(80, spans, {"hidrop_keep": keeps})
