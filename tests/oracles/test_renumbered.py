"""The renumbered oracle against Hugging Face, the two masked oracles, and itself with one thing made wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.oracles import renumbered as renumbered_oracle
from tests.oracles.masked import Oracle
from tests.oracles.renumbered import DecodeIds, Order, Positions, RenumberedOracle, RenumberedResult, gap, merged_first
from tests.verify.reference.test_mustdrop import (
    ALL_STAGES,
    FILTERS,
    NO_KEYS,
    PROMPT,
    PROMPTS,
    TWO_IMAGES,
    assert_close,
    dense_generate,
    load,
    pixels,
)
from vllm_hidrop.verify.reference.mustdrop import MustDropOracle
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, NUM_LAYERS, make_llava
from vllm_hidrop.verify.tiny_models import TOKENS_PER_IMAGE as V

THREE_IMAGES = [1, *[IMAGE_TOKEN] * V, 5, *[IMAGE_TOKEN] * (2 * V), 11, 12]
ALL_PROMPTS = [*PROMPTS, (THREE_IMAGES, 3), ([1, 5, 7, 11, 12, 13, 3], 0)]
SOME_PROMPTS = [(PROMPT, 1), (THREE_IMAGES, 3)]
NUM_TOKENS = 4
PYRAMID = [(0, V), (2, 32), (4, 16), (6, 8)]
FASTV = [(0, V), (2, 16)]
LATE = [(0, 0), (1, V), (3, 20), (5, 0)]
SCHEDULES: list[tuple[list[tuple[int, int]], Rule]] = [
    (PYRAMID, "attention_next"),
    (FASTV, "attention_previous"),
    (LATE, "attention_next"),
    ([(0, 40), (3, 7)], "attention_next"),
    (PYRAMID, "random"),
    (PYRAMID, "uniform"),
]
MUSTDROP = [
    ALL_STAGES,
    replace(ALL_STAGES, cut_cache=False),
    replace(ALL_STAGES, key_layer="feature", key_rate=0.2, merge_threshold=0.22, merge_window=4),
    replace(NO_KEYS, filter_layers=(0, NUM_LAYERS - 1)),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    return load(make_llava(tmp_path_factory.mktemp("models") / request.param, request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    return load(make_llava(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    return load(make_llava(tmp_path_factory.mktemp("models") / "siglip", tower="siglip"))


def images(count: int) -> torch.Tensor | None:
    return pixels(count) if count else None


def stages(schedule: Sequence[tuple[int, int]], num_images: int) -> list[OracleStage]:
    return [OracleStage(layer, (keep,) * num_images) for layer, keep in schedule]


def staged(
    model: LlavaForConditionalGeneration,
    prompt: tuple[list[int], int],
    schedule: Sequence[tuple[int, int]] = PYRAMID,
    rule: Rule = "attention_next",
    positions: Positions = "renumbered",
    shifts: dict[int, int] | None = None,
) -> RenumberedResult:
    token_ids, count = prompt
    oracle = RenumberedOracle(model, shifts)
    result = oracle.generate(token_ids, images(count), stages(schedule, count), rule, NUM_TOKENS, positions=positions)
    assert min(result.margins.values()) > 1e-6, "the decisions must not hang on rounding"
    return result


def mustdrop(
    model: LlavaForConditionalGeneration,
    prompt: tuple[list[int], int],
    settings: MustDropSettings = ALL_STAGES,
    order: Order = "merged_first",
    decode_ids: DecodeIds = "cache_length",
    positions: Positions = "renumbered",
    shifts: dict[int, int] | None = None,
) -> RenumberedResult:
    token_ids, count = prompt
    result = RenumberedOracle(model, shifts).generate_mustdrop(
        token_ids,
        images(count),
        settings,
        NUM_TOKENS,
        order=order,
        decode_ids=decode_ids,
        positions=positions,
    )
    assert min(result.margins.values()) > 1e-6, "the decisions must not hang on rounding"
    return result


def differ(one: RenumberedResult, other: RenumberedResult, step: int = 0) -> bool:
    return float((one.logits[step] - other.logits[step]).abs().max()) > 1e-2


@pytest.mark.parametrize(("token_ids", "count"), ALL_PROMPTS)
def test_nothing_dropped_equals_hugging_face(
    model: LlavaForConditionalGeneration, token_ids: list[int], count: int
) -> None:
    expected_ids, expected = dense_generate(model, token_ids, images(count), NUM_TOKENS)
    prompt = token_ids, count
    nothing = replace(ALL_STAGES, individual_threshold=0, merge_threshold=None)
    for result in (
        staged(model, prompt, [(0, V), (3, V)]),
        mustdrop(model, prompt, nothing, decode_ids="cache_length"),
        mustdrop(model, prompt, nothing, decode_ids="after_prompt"),
    ):
        assert result.token_ids == expected_ids
        assert_close(result.logits, expected)
        assert result.kept == [[list(range(V))] * count] * NUM_LAYERS
        assert result.ids == [list(range(len(token_ids)))] * NUM_LAYERS


@pytest.mark.parametrize("prompt", ALL_PROMPTS)
@pytest.mark.parametrize(("schedule", "rule"), SCHEDULES)
def test_original_positions_equal_the_masked_oracle(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int], schedule: list[tuple[int, int]], rule: Rule
) -> None:
    token_ids, count = prompt
    result = staged(model, prompt, schedule, rule, positions="persistent")
    expected = Oracle(model).generate(token_ids, images(count), stages(schedule, count), rule, NUM_TOKENS)
    assert {layer: result.kept[layer] for layer in expected.selections} == expected.selections
    assert [sorted(rows) for rows in result.rows] == [of.nonzero().flatten().tolist() for of in expected.visible]
    assert result.token_ids == expected.token_ids
    assert_close(result.logits, expected.logits)
    for layer, rows in enumerate(result.rows):
        assert_close(result.keys[layer], expected.keys[layer][rows])
        assert_close(result.values[layer], expected.values[layer][rows])


@pytest.mark.parametrize("prompt", ALL_PROMPTS)
@pytest.mark.parametrize("settings", MUSTDROP)
def test_original_positions_in_raster_order_equal_the_masked_mustdrop_oracle(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int], settings: MustDropSettings
) -> None:
    token_ids, count = prompt
    result = mustdrop(model, prompt, settings, "raster", "after_prompt", "persistent")
    expected = MustDropOracle(model).generate(token_ids, images(count), settings, NUM_TOKENS)
    assert result.kept == expected.kept
    assert result.token_ids == expected.token_ids
    assert_close(result.logits, expected.logits)
    assert {name: result.margins[name] for name in expected.margins} == pytest.approx(expected.margins, abs=2e-6)


def test_siglip_works_as_clip_does(siglip: LlavaForConditionalGeneration) -> None:
    settings = replace(ALL_STAGES, key_rate=0)
    for prompt in SOME_PROMPTS:
        expected = MustDropOracle(siglip).generate(prompt[0], images(prompt[1]), settings, NUM_TOKENS)
        same = mustdrop(siglip, prompt, settings, "raster", "after_prompt", "persistent")
        assert (same.kept, same.token_ids) == (expected.kept, expected.token_ids)
        assert differ(same, mustdrop(siglip, prompt, settings))
        assert staged(siglip, prompt).ids[-1] == list(range(len(prompt[0]) - (V - 8) * prompt[1]))


@pytest.mark.parametrize("prompt", ALL_PROMPTS)
@pytest.mark.parametrize(("schedule", "rule"), SCHEDULES)
def test_every_layer_counts_its_rows_from_zero_and_generated_tokens_go_on(
    llama: LlavaForConditionalGeneration, prompt: tuple[list[int], int], schedule: list[tuple[int, int]], rule: Rule
) -> None:
    token_ids, count = prompt
    result = staged(llama, prompt, schedule, rule)
    keeps = dict(schedule)
    num_text, keep = len(token_ids) - V * count, 0
    for layer, (rows, ids) in enumerate(zip(result.rows, result.ids, strict=True)):
        keep = keeps.get(layer, keep)
        assert ids == list(range(num_text + keep * count))
        assert rows == sorted(rows)
        assert [len(patches) for patches in result.kept[layer]] == [keep] * count
    assert result.cached == result.rows
    assert result.generated_ids == [[len(ids) + step for ids in result.ids] for step in range(NUM_TOKENS - 1)]


def test_images_are_cut_to_counts_of_their_own(llama: LlavaForConditionalGeneration) -> None:
    own = [OracleStage(0, (V, 0)), OracleStage(2, (10, V)), OracleStage(3, (10, 4))]
    result = RenumberedOracle(llama).generate(TWO_IMAGES, pixels(2), own, "attention_next", 2)
    num_text = len(TWO_IMAGES) - 2 * V
    counts = [(V, 0)] * 2 + [(10, V)] + [(10, 4)] * (NUM_LAYERS - 3)
    assert [tuple(map(len, kept)) for kept in result.kept] == counts
    assert result.ids == [list(range(num_text + sum(of_layer))) for of_layer in counts]


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_a_cut_ranks_by_hugging_faces_attention_under_the_ids_before_it(
    llama: LlavaForConditionalGeneration, prompt: tuple[list[int], int]
) -> None:
    """The second cut: the layer before it ran the first one's survivors, numbered anew."""
    result = staged(llama, prompt, [(0, V), (2, 32), (4, 16)])
    text: Any = llama.model.language_model
    token_ids, count = prompt
    starts = [p for p, token in enumerate(token_ids) if token == IMAGE_TOKEN][::V]
    with torch.no_grad():
        ids = torch.tensor([token_ids])
        dense: Any = llama(input_ids=ids, pixel_values=images(count), output_hidden_states=True)
        hidden = dense.hidden_states[2][:, result.rows[2]]
        for index in (2, 3, 4):
            num_rows = hidden.shape[1]
            rope = text.rotary_emb(hidden, torch.arange(num_rows)[None])
            causal = torch.full((num_rows, num_rows), -torch.inf).triu(1)[None, None]
            layer = text.layers[index]
            _, weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rope, attention_mask=causal)
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rope)
    score = dict(zip(result.rows[3], weights[0, :, -1].mean(dim=0).tolist(), strict=True))
    for start, before, after in zip(starts, result.kept[3], result.kept[4], strict=True):
        best = sorted(before, key=lambda patch: -score[start + patch])[:16]
        assert after == sorted(best)


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_constants_added_to_a_layers_ids_change_nothing(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int]
) -> None:
    shifts = {0: 40, 2: 7, 3: 500, 6: 1}
    for plain, shifted in (
        (staged(model, prompt), staged(model, prompt, shifts=shifts)),
        (mustdrop(model, prompt), mustdrop(model, prompt, shifts=shifts)),
    ):
        assert (shifted.kept, shifted.token_ids) == (plain.kept, plain.token_ids)
        assert_close(shifted.logits, plain.logits, 1e-3)
        assert float((shifted.keys[3] - plain.keys[3]).abs().max()) > 1e-2


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_original_positions_give_other_sets_and_logits(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int]
) -> None:
    renumbered, original = staged(model, prompt), staged(model, prompt, positions="persistent")
    assert renumbered.kept[:4] == original.kept[:4], "nothing was renumbered before the first cut"
    assert renumbered.kept[4:] != original.kept[4:]
    assert differ(renumbered, original)
    original = mustdrop(model, prompt, ALL_STAGES, "raster", "after_prompt", "persistent")
    renumbered = mustdrop(model, prompt, order="raster")
    assert renumbered.kept[0] == original.kept[0]
    assert renumbered.kept[2:] != original.kept[2:]
    assert differ(renumbered, original)


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_a_cut_that_ranked_under_original_ids_would_keep_others(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the scoring is made wrong here: the layers themselves run renumbered."""
    right = staged(model, prompt)
    heads = RenumberedOracle._heads
    wrong_ids = {4: right.rows[3], 6: right.rows[5]}

    def score_with_wrong_ids(self: Any, index: int, hidden: torch.Tensor, ids: list[int]) -> Any:
        is_scoring = index in wrong_ids and len(ids) == len(wrong_ids[index])
        return heads(self, index, hidden, wrong_ids[index] if is_scoring else ids)

    monkeypatch.setattr(RenumberedOracle, "_heads", score_with_wrong_ids)
    assert staged(model, prompt).kept[4] != right.kept[4]


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_merged_tokens_come_first_and_survivors_keep_that_order(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int]
) -> None:
    result = mustdrop(model, prompt)
    starts = [p for p, token in enumerate(prompt[0]) if token == IMAGE_TOKEN][::V]
    for image, start in enumerate(starts):
        order = [row - start for row in result.rows[0] if start <= row < start + V]
        alive = set(order)
        corners = [patch for patch in order if patch % 2 and patch // 8 % 2 and patch - 1 not in alive]
        assert 1 < len(corners) < 16
        assert order[: len(corners)] == corners, "merged windows first"
        assert corners != sorted(corners), "by similarity, not by place"
        assert order[len(corners) :] == sorted(alive - set(corners))
        assert result.kept[0][image] == sorted(alive)
    for before, after in zip(result.rows, result.rows[1:], strict=False):
        assert after == [row for row in before if row in after]
    assert result.ids == [list(range(len(rows))) for rows in result.rows]
    assert len(result.rows[0]) > len(result.rows[2]) > len(result.rows[-1])


def test_the_order_is_that_of_the_towers_own_similarities(llama: LlavaForConditionalGeneration) -> None:
    result = mustdrop(llama, (PROMPT, 1))
    tower: Any = llama.model.vision_tower
    with torch.no_grad():
        first = tower(pixels(1), output_hidden_states=True).hidden_states[1][0, 1:].unflatten(0, (4, 2, 4, 2))
    windows = first.transpose(1, 2).reshape(16, 4, -1)
    cosines = torch.nn.functional.cosine_similarity(windows[:, :, None], windows[:, None], dim=-1)
    scores = (cosines.sum(dim=(1, 2)) - 4) / 12
    best = [window for window in scores.argsort(descending=True).tolist() if scores[window] >= 0.24]
    corners = [(2 * (window // 4) + 1) * 8 + 2 * (window % 4) + 1 for window in best]
    assert [row - 3 for row in result.rows[0][3 : 3 + len(corners)]] == corners


def test_equal_windows_stay_in_raster_order() -> None:
    assert merged_first({9: 0.3, 11: 0.5, 25: 0.5}, [0, 1, 9, 11, 16, 25]) == [11, 25, 9, 0, 1, 16]
    assert merged_first({}, [0, 3, 4]) == [0, 3, 4]


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_a_wrong_order_gives_other_sets(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, raster = mustdrop(model, prompt), mustdrop(model, prompt, order="raster")
    assert right.kept[0] == raster.kept[0]
    assert right.kept[2:] != raster.kept[2:]
    assert differ(right, raster)
    monkeypatch.setattr(
        renumbered_oracle, "merged_first", lambda scores, alive: merged_first({p: -s for p, s in scores.items()}, alive)
    )
    rising = mustdrop(model, prompt)
    assert right.kept[2:] != rising.kept[2:]
    assert differ(right, rising)


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_generated_ids_count_the_cache_or_go_on_after_the_prompt(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int]
) -> None:
    """The filters are in layers 1, 3 and 4: the caches of 1 to 4 are cut, and only they tell the two apart."""
    released, consistent = mustdrop(model, prompt), mustdrop(model, prompt, decode_ids="after_prompt")
    assert torch.equal(released.logits[0], consistent.logits[0])
    assert released.cached == consistent.cached
    for step in range(NUM_TOKENS - 1):
        assert released.generated_ids[step] == [len(rows) + step for rows in released.cached]
        assert consistent.generated_ids[step] == [len(rows) + step for rows in consistent.rows]
    pairs = zip(released.generated_ids[0], consistent.generated_ids[0], strict=True)
    assert [one == other for one, other in pairs] == [True, *[False] * 4, *[True] * (NUM_LAYERS - 5)]
    assert released.cached[0] == released.rows[0]
    assert all(rows == released.rows[-1] for rows in released.cached[1:])
    assert differ(released, consistent, step=1)


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_a_cache_that_is_not_cut_goes_on_alike(
    model: LlavaForConditionalGeneration, prompt: tuple[list[int], int]
) -> None:
    settings = replace(ALL_STAGES, cut_cache=False)
    counted, after = mustdrop(model, prompt, settings), mustdrop(model, prompt, settings, decode_ids="after_prompt")
    assert counted.generated_ids == after.generated_ids
    assert torch.equal(counted.logits, after.logits)
    assert counted.cached == counted.rows
    assert differ(counted, mustdrop(model, prompt), step=1)


def test_keys_keep_the_ids_their_layer_ran_them_with(llama: LlavaForConditionalGeneration) -> None:
    """What a cut cache holds is a part of what the uncut one holds, unturned."""
    cut = mustdrop(llama, (TWO_IMAGES, 2))
    uncut = mustdrop(llama, (TWO_IMAGES, 2), replace(ALL_STAGES, cut_cache=False))
    for layer, rows in enumerate(cut.cached):
        places = [uncut.cached[layer].index(row) for row in rows]
        assert torch.equal(cut.keys[layer], uncut.keys[layer][places])
        assert torch.equal(cut.values[layer], uncut.values[layer][places])


def test_without_vision_the_text_closes_up(llama: LlavaForConditionalGeneration) -> None:
    text = [token for token in PROMPT if token != IMAGE_TOKEN]
    expected_ids, expected = dense_generate(llama, text, None, NUM_TOKENS)
    result = staged(llama, (PROMPT, 1), [(0, 0)])
    assert result.token_ids == expected_ids
    assert_close(result.logits, expected)


def test_generation_ends_with_the_first_stop_id(llama: LlavaForConditionalGeneration) -> None:
    oracle, of_one = RenumberedOracle(llama), stages(PYRAMID, 1)
    free = oracle.generate(PROMPT, pixels(1), of_one, "attention_next", 5)
    stopped = oracle.generate(PROMPT, pixels(1), of_one, "attention_next", 5, stop_ids={free.token_ids[2]})
    end = free.token_ids.index(free.token_ids[2]) + 1
    assert stopped.token_ids == free.token_ids[:end]
    assert torch.equal(stopped.logits, free.logits[:end])


def test_margins_are_gaps_between_neighbours() -> None:
    scores = torch.tensor([0.5, 0.125, 0.25])
    assert gap(scores, 1) == 0.25
    assert gap(scores, 2) == 0.125
    assert gap(torch.tensor([0.5, 0.5]), 1) == 0
    assert gap(torch.tensor([0.5, torch.nan]), 1) == 0


def test_input_without_a_meaning_is_refused(llama: LlavaForConditionalGeneration) -> None:
    oracle, wrong = RenumberedOracle(llama), "sideways"
    of_one: Any = stages([(0, 9)], 1)
    with pytest.raises(ValueError, match="attention_previous cannot cut at layer 0"):
        oracle.generate(PROMPT, pixels(1), of_one, "attention_previous", 1)
    with pytest.raises(ValueError, match="unknown 'sideways'"):
        oracle.generate(PROMPT, pixels(1), of_one, wrong, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        oracle.generate(PROMPT, pixels(1), of_one, "random", 0)
    with pytest.raises(ValueError, match="go on after the prompt"):
        oracle.generate_mustdrop(PROMPT, pixels(1), FILTERS, 1, positions="persistent")
    with pytest.raises(ValueError, match="3 x 3 must divide"):
        oracle.generate_mustdrop(PROMPT, pixels(1), replace(FILTERS, merge_threshold=0.8), 1)
