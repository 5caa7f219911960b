"""Training's staged forward against the dense masked oracle; differentiable top-k against its definition."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.oracles.masked import Oracle, Positions
from tests.oracles.renumbered import RenumberedOracle
from vllm_hidrop.config import make_method
from vllm_hidrop.lab.train.decoder import Decoder, query_attention
from vllm_hidrop.lab.train.dtopk import SMOOTH, gates, hard_rank, soft_mask, soft_rank
from vllm_hidrop.lab.train.rows import Rows, packed_starts
from vllm_hidrop.lab.train.staged import Selection, StagedTraining
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.scoring import select_top
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, NUM_LAYERS, TOKENS_PER_IMAGE, text_config, vision_config

SHAPE = ModelShape(NUM_LAYERS, TOKENS_PER_IMAGE)
OWN = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
PYRAMID = OWN | {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": 8}
FROM_THE_START = OWN | {"inject_layer": 1, "filter_layers": [2, 3, 5], "keeps": [0.5, 9, 1], "exit_layer": None}
CASES: list[tuple[str, str, dict[str, Any], Rule]] = [
    ("llama", "none", {}, "uniform"),
    ("llama", "hidrop", PYRAMID, "attention_next"),
    ("mistral", "hidrop", FROM_THE_START, "attention_next"),
    ("qwen2", "hidrop", OWN | {"inject_layer": 2, "filter_layers": [], "keeps": [], "exit_layer": 5}, "attention_next"),
    ("qwen2", "fastv", {"layer": 3, "keep": 7}, "attention_previous"),
    ("llama", "pyramiddrop", {"cuts": [0.25, 0.5], "keeps": [30, 3]}, "attention_next"),
    ("llama", "random", {"layer": 3, "keep": 9, "seed": 5}, "random"),
    ("llama", "uniform", {"layer": 1, "keep": 11}, "uniform"),
    ("llama", "random", {"layer": 0, "keep": 9}, "random"),
]
LAYOUTS = ((3, 1, 5), (7, 0, 2), (2, 2, 4))
"""Text tokens, images, text tokens."""


@cache
def model(text: str) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=vision_config("clip"),
        text_config=text_config(text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15, generator=generator)
    return llava


def prompts() -> list[tuple[list[int], Tensor | None]]:
    rng = np.random.default_rng(3)
    made = []
    for before, images, after in LAYOUTS:
        words = [rng.integers(4, 120, number).tolist() for number in (before, after)]
        pixels = torch.from_numpy(rng.standard_normal((images, 3, 64, 64), dtype=np.float32)) if images else None
        made.append((words[0] + [IMAGE_TOKEN] * (images * TOKENS_PER_IMAGE) + words[1], pixels))
    return made


def batch(llava: LlavaForConditionalGeneration) -> tuple[Tensor, Rows]:
    """All prompts packed; the last row of each is its query."""
    oracle = Oracle(llava)
    embeds = [oracle._prepare(*prompt).rows.detach() for prompt in prompts()]
    row_starts = packed_starts([len(one) for one in embeds])
    images = [
        torch.tensor([-1] * before + sorted([*range(number)] * TOKENS_PER_IMAGE) + [-1] * after)
        for before, number, after in LAYOUTS
    ]
    positions = torch.cat([torch.arange(len(one)) for one in embeds])
    is_query = torch.zeros(len(positions), dtype=torch.bool)
    is_query[row_starts[1:].long() - 1] = True
    return torch.cat(embeds), Rows(positions, torch.cat(images), is_query, row_starts)


def staged_of(llava: LlavaForConditionalGeneration, *arguments: Any, **options: Any) -> StagedTraining:
    return StagedTraining.from_method(Decoder(llava.model.language_model), *arguments, **options)


def last_logits(llava: LlavaForConditionalGeneration, staged: StagedTraining, embeds: Tensor, rows: Rows) -> Tensor:
    output = staged(embeds, rows)
    return llava.lm_head(output.hidden[output.row_starts[1:].long() - 1])


@pytest.mark.parametrize(
    ("text", "name", "options", "rule"), CASES, ids=[f"{case[0]}-{case[1]}-{index}" for index, case in enumerate(CASES)]
)
@pytest.mark.parametrize("selection", list(Selection))
def test_the_staged_forward_equals_the_masked_oracle(
    text: str, name: str, options: dict[str, Any], rule: Rule, selection: str
) -> None:
    check_against_the_oracle(text, name, options, rule, selection, "persistent")


@pytest.mark.parametrize("scheme", ["compacted", "grouped"])
@pytest.mark.parametrize("case", [1, 4, 5])
def test_the_staged_forward_equals_the_oracle_under_every_position_scheme(case: int, scheme: Positions) -> None:
    check_against_the_oracle(*CASES[case], Selection.AS_RELEASED, scheme)


@pytest.mark.parametrize("selection", list(Selection))
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_staged_forward_equals_the_reference_under_renumbered_positions(case: int, selection: str) -> None:
    text, name, options, rule = CASES[case]
    llava, method = model(text), make_method(name, None, options)
    oracle, schedule = RenumberedOracle(llava), method.schedule(SHAPE)
    expected = []
    for (tokens, pixels), (_, number, _) in zip(prompts(), LAYOUTS, strict=True):
        kept = schedule.kept(TOKENS_PER_IMAGE)
        stages = [
            OracleStage(stage.first_layer, (keep,) * number) for stage, keep in zip(schedule.stages, kept, strict=True)
        ]
        result = oracle.generate(tokens, pixels, stages, rule, 1, seed=options.get("seed", 0))
        expected.append(result.logits[0])
    staged = staged_of(llava, method, SHAPE, selection, "renumbered")
    found = last_logits(llava, staged, *batch(llava))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def check_against_the_oracle(
    text: str, name: str, options: dict[str, Any], rule: Rule, selection: str, scheme: Positions
) -> None:
    llava = model(text)
    method = make_method(name, None, options)
    schedule = method.schedule(SHAPE)
    expected = []
    for (tokens, pixels), (_, number, _) in zip(prompts(), LAYOUTS, strict=True):
        kept = schedule.kept(TOKENS_PER_IMAGE)
        stages = [
            OracleStage(stage.first_layer, (keep,) * number) for stage, keep in zip(schedule.stages, kept, strict=True)
        ]
        seed = options.get("seed", 0)
        result = Oracle(llava).generate(tokens, pixels, stages, rule, 1, seed=seed, positions=scheme)
        expected.append(result.logits[0])
    staged = staged_of(llava, method, SHAPE, selection, scheme)
    found = last_logits(llava, staged, *batch(llava))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def pyramid(selection: str, gradient_checkpointing: bool = False) -> StagedTraining:
    decoder = Decoder(model("llama").model.language_model, gradient_checkpointing=gradient_checkpointing)
    return StagedTraining.from_method(decoder, make_method("hidrop", None, PYRAMID), SHAPE, selection)


def test_rows_that_are_left_are_text_only_after_the_exit() -> None:
    embeds, rows = batch(model("llama"))
    output = pyramid(Selection.AS_RELEASED)(embeds, rows)
    assert output.row_starts.diff().tolist() == [before + after for before, _, after in LAYOUTS]
    assert bool((rows.images[output.places] == -1).all())


@pytest.mark.parametrize("selection", list(Selection))
def test_a_sample_in_a_pack_is_computed_as_it_is_alone(selection: str) -> None:
    embeds, rows = batch(model("llama"))
    weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(4))
    whole = embeds.clone().requires_grad_()
    packed = pyramid(selection)(whole, rows)
    (packed.hidden * weights[packed.places]).sum().backward()
    assert whole.grad is not None
    start = 0
    for length, kept in zip(rows.lengths, packed.hidden.split(packed.row_starts.diff().tolist()), strict=True):
        here = torch.arange(start, start + length)
        one = embeds[here].requires_grad_()
        alone = pyramid(selection)(one, replace(rows.take(here), row_starts=packed_starts([length])))
        (alone.hidden * weights[here][alone.places]).sum().backward()
        torch.testing.assert_close(kept, alone.hidden, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.grad[here], one.grad, atol=1e-4, rtol=1e-3)
        start += length


def test_a_sample_without_text_has_no_rows_where_there_is_no_vision() -> None:
    images = torch.tensor([0] * TOKENS_PER_IMAGE + [-1] * 3)
    is_query = torch.tensor([False] * (TOKENS_PER_IMAGE + 2) + [True])
    row_starts = packed_starts([TOKENS_PER_IMAGE, 3])
    rows = Rows(torch.arange(TOKENS_PER_IMAGE + 3), images, is_query, row_starts)
    output = pyramid(Selection.DIFFERENTIABLE)(torch.randn(TOKENS_PER_IMAGE + 3, 128), rows)
    assert output.row_starts.tolist() == [0, 0, 3]


@pytest.mark.parametrize("selection", list(Selection))
def test_gradient_checkpointing_changes_no_gradient(selection: str) -> None:
    llava = model("llama")
    found = []
    for checkpointing in (False, True):
        embeds, rows = batch(llava)
        embeds.requires_grad_()
        last_logits(llava, pyramid(selection, gradient_checkpointing=checkpointing), embeds, rows).sum().backward()
        found.append(embeds.grad)
    torch.testing.assert_close(*found)


def test_only_differentiable_selections_send_a_gradient_through_the_scores() -> None:
    """With constant selection a key that text never attends to again gets no gradient; the gate gives it one."""
    gradients = {}
    for selection in Selection:
        llava = model("llama")
        embeds, rows = batch(llava)
        embeds.requires_grad_()
        last_logits(llava, pyramid(selection), embeds, rows).square().sum().backward()
        assert embeds.grad is not None
        gradients[selection] = embeds.grad
    for selection in (Selection.DIFFERENTIABLE, Selection.AS_WRITTEN):
        assert not torch.allclose(gradients[selection], gradients[Selection.AS_RELEASED], rtol=1e-3)


def test_scores_are_the_mean_over_the_rounds_query_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(16, 4, 8, generator=generator), torch.randn(16, 2, 8, generator=generator)
    asked = torch.zeros(16, dtype=torch.bool)
    asked[[5, 8, 11]] = True  # a sample of nine rows, one of three, one of four without a query row
    rows = Rows(torch.arange(16), torch.full((16,), -1), asked, packed_starts([9, 3, 4]))
    expected = torch.zeros(16)
    for row, start, number in ((5, 0, 2), (8, 0, 2), (11, 9, 1)):
        for head in range(4):
            logits = key[start : row + 1, head // 2] @ query[row, head] / 8**0.5
            expected[start : row + 1] += logits.softmax(-1) / (4 * number)
    torch.testing.assert_close(query_attention(query, key, rows), expected)


def test_a_sample_without_a_query_row_is_not_pruned() -> None:
    llava = model("llama")
    embeds, rows = batch(llava)
    rows.is_query[: int(rows.row_starts[1])] = False
    options = OWN | {"inject_layer": 1, "filter_layers": [2], "keeps": [4], "exit_layer": None}
    method = make_method("hidrop", None, options)
    output = staged_of(llava, method, SHAPE)(embeds, rows)
    assert output.row_starts.diff().tolist() == [3 + 64 + 5, 7 + 2, 2 + 2 * 4 + 4]


def positions_after_cut(scheme: str) -> tuple[list[int], list[int]]:
    """Positions of a prompt of 2 text, 6 vision and 3 text rows, packed behind another one, before the first layer
    and after the last cut."""
    seen: list[list[int]] = []
    options = {"inject_layer": 1, "filter_layers": [2], "keeps": [3], "exit_layer": None, "shape": [NUM_LAYERS, 6]}
    method = make_method("hidrop", None, options)
    staged = staged_of(model("llama"), method, ModelShape(NUM_LAYERS, 6), position_scheme=scheme)
    original = staged.decoder.rotary

    def rotary(hidden: Tensor, positions: Tensor) -> Any:
        seen.append(positions[5:].tolist())
        return original(hidden, positions)

    staged.decoder.rotary = rotary  # type: ignore[method-assign]
    images = torch.tensor([*[-1] * 5, -1, -1, *[0] * 6, -1, -1, -1])
    is_query = torch.tensor([False] * 4 + [True] + [False] * 10 + [True])
    positions = torch.cat([torch.arange(5), torch.arange(11)])
    rows = Rows(positions, images, is_query, packed_starts([5, 11]))
    staged(torch.randn(16, 128, generator=torch.Generator().manual_seed(2)), rows)
    return seen[0], seen[-1]


def test_persistent_positions_never_change() -> None:
    first, last = positions_after_cut("persistent")
    assert first == list(range(11))
    assert len(last) == 8
    assert set(last) < set(first)


def test_compacted_positions_renumber_the_survivors_only() -> None:
    first, last = positions_after_cut("compacted")
    assert first == list(range(11))
    assert last == [0, 1, 2, 3, 4, 8, 9, 10]


def test_renumbered_positions_count_every_row_that_is_left() -> None:
    first, last = positions_after_cut("renumbered")
    assert first == list(range(11))
    assert last == list(range(8))


def test_grouped_positions_number_text_without_the_hole() -> None:
    first, last = positions_after_cut("grouped")
    assert first == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4]
    assert last[:2] + last[5:] == [0, 1, 2, 3, 4]


SCORES = st.lists(st.integers(0, 10_000), min_size=3, max_size=60, unique=True)


@given(SCORES, st.data())
def test_the_hard_mask_keeps_what_serving_keeps(values: list[int], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32) / 10_000
    keep = data.draw(st.integers(1, len(values) - 1))
    mask = soft_mask(hard_rank(scores), 1 - keep / len(values) + 1e-6)
    assert (mask > 0.5).nonzero().flatten().tolist() == select_top(scores, keep).tolist()


@given(SCORES)
def test_gates_are_one_forward(values: list[int]) -> None:
    scores = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    assert torch.equal(gates(scores, 2).detach(), torch.ones(len(values)))


def test_the_smooth_mask_teaches_every_survivor_and_the_papers_only_those_at_the_threshold() -> None:
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0))
    taught = {}
    for factor in (None, SMOOTH):
        rank = hard_rank(scores).requires_grad_()
        soft_mask(rank, 0.75, factor).sum().backward()
        assert rank.grad is not None
        survivors = rank.grad[select_top(scores, 50)]
        taught[factor] = int((survivors > 0.05 * rank.grad.max()).sum())
    assert taught[None] < 8
    assert taught[SMOOTH] == 50


def test_the_masks_gradients_are_its_derivatives() -> None:
    """Numerically: through the smooth rank to the scores (scale held fixed), and to a learnable dropped share."""
    scores = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    share = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    scale = float(scores.detach().std()) * 0.1

    def smooth(given: Tensor, dropped: Tensor) -> Tensor:
        return soft_mask(torch.sigmoid((given[:, None] - given[None, :]) / scale).mean(1), dropped)

    assert torch.autograd.gradcheck(smooth, (scores, share))
    torch.testing.assert_close(soft_mask(soft_rank(scores), share), smooth(scores, share))


def test_the_gate_carries_the_masks_gradient() -> None:
    scores = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    share = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(12, dtype=torch.float64)
    rank = hard_rank(scores.detach())
    (gates(scores, 5, share) * weights).sum().backward()
    slope = 12 * torch.sigmoid(12 * (rank - 0.6)) * (1 - torch.sigmoid(12 * (rank - 0.6))) * weights
    torch.testing.assert_close(share.grad, -slope.sum())
    (expected,) = torch.autograd.grad((soft_rank(scores) * slope).sum(), scores)
    torch.testing.assert_close(scores.grad, expected)
