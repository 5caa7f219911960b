"""The oracle against Hugging Face itself: dense where nothing is pruned, shortened rows elsewhere.

``shortened_generate`` is the second opinion: it really gathers rows and calls the decoder layers of
Hugging Face, with their own attention weights as scores.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from tests.oracles.masked import Oracle
from vllm_hidrop.verify.reference.attention import additive_mask, random_scores, top_indices, uniform_indices
from vllm_hidrop.verify.reference.stages import OracleStage, Rule, check_stages

V = 16  # vision tokens of one 56 x 56 image in patches of 14
IMAGE_TOKEN = 99
NUM_LAYERS = 6
PROMPT = [1, 5, 7, *[IMAGE_TOKEN] * V, 11, 12, 13, 2]
TWO_IMAGES = [1, *[IMAGE_TOKEN] * V, 5, 6, *[IMAGE_TOKEN] * V, 11, 12]
ADJACENT_IMAGES = [1, *[IMAGE_TOKEN] * (2 * V), 11, 12]
TEXT_ONLY = [1, 5, 7, 11, 12, 13, 2]
HIDROP = [OracleStage(layer, (keep,)) for layer, keep in [(0, 0), (1, V), (2, 9), (4, 3), (5, 0)]]
FASTV = [OracleStage(0, (V,)), OracleStage(2, (7,))]
PYRAMID = [OracleStage(layer, (keep,)) for layer, keep in [(0, V), (1, 11), (3, 5), (4, 2)]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def text_config(family: str) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    if family == "llama":
        return LlamaConfig(**shape, num_key_value_heads=4)
    if family == "mistral":
        return MistralConfig(**shape, num_key_value_heads=2, head_dim=32, sliding_window=None)
    return Qwen2Config(**shape, num_key_value_heads=2)


def build_model(family: str) -> LlavaForConditionalGeneration:
    """Random weights, wide enough (std 0.15) that attention is far from flat; biases included."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config(family), image_token_index=IMAGE_TOKEN)
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    return model


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest) -> LlavaForConditionalGeneration:
    return build_model(request.param)


@pytest.fixture(scope="module")
def llama() -> LlavaForConditionalGeneration:
    return build_model("llama")


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def dense_generate(
    model: Any, token_ids: list[int], pixel_values: torch.Tensor | None, max_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits by the forward of Hugging Face alone."""
    generated: list[int] = []
    logits = []
    for _ in range(max_tokens):
        input_ids = torch.tensor([token_ids + generated])
        logits.append(model(input_ids=input_ids, pixel_values=pixel_values).logits[0, -1])
        generated.append(int(logits[-1].argmax()))
    return generated, torch.stack(logits)


class Shortened:
    """One image, greedy, rows gathered: ``positions`` are the rows that physically exist."""

    def __init__(self, model: Any, token_ids: list[int], pixel_values: torch.Tensor) -> None:
        self.model = model
        self.text = model.model.language_model
        self.token_ids = token_ids
        self.start = token_ids.index(IMAGE_TOKEN)
        self.features = model.get_image_features(pixel_values=pixel_values).pooler_output[0]
        self.selections: dict[int, list[int]] = {}
        self.scores: dict[int, torch.Tensor] = {}  # of the survivors

    def layer(self, index: int, hidden: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Output rows, and the attention [rows] of the last row, mean over heads."""
        rope = self.text.rotary_emb(hidden[None], torch.tensor([positions]))
        causal = torch.full((len(positions),) * 2, -torch.inf).triu(1)[None, None]
        layer = self.text.layers[index]
        normed = layer.input_layernorm(hidden[None])
        _, weights = layer.self_attn(normed, position_embeddings=rope, attention_mask=causal)
        output = layer(hidden[None], attention_mask=causal, position_embeddings=rope)
        return output[0], weights[0, :, -1].mean(dim=0)

    def logits(self, generated: list[int], stages: Sequence[OracleStage], rule: Rule) -> Any:
        """[vocabulary] of the last row; the selection is made while nothing is generated yet."""
        tokens = self.token_ids + generated
        positions = [p for p, token in enumerate(tokens) if token != IMAGE_TOKEN]
        hidden = self.text.embed_tokens(torch.tensor([tokens[p] for p in positions]))
        keeps = {stage.first_layer: stage.keep[0] for stage in stages}
        kept: list[int] = []
        last_row = torch.empty(0)
        for index in range(NUM_LAYERS):
            if index in keeps and keeps[index] == V:
                before = torch.tensor(positions) < self.start
                hidden = torch.cat([hidden[before], self.features, hidden[~before]])
                kept = list(range(V))
                positions = sorted([*positions, *(self.start + j for j in kept)])
            elif index in keeps:
                if not generated and 0 < keeps[index] < len(kept):
                    if rule == "attention_next":
                        last_row = self.layer(index, hidden, positions)[1]
                    self.select(index, keeps[index], kept, positions, last_row)
                kept = self.selections[index] if keeps[index] else []
                gone = set(range(self.start, self.start + V)) - {self.start + j for j in kept}
                rows = [row for row, p in enumerate(positions) if p not in gone]
                hidden, positions = hidden[rows], [positions[row] for row in rows]
            hidden, last_row = self.layer(index, hidden, positions)
        return self.model.lm_head(self.text.norm(hidden[-1]))

    def select(self, index: int, keep: int, kept: list[int], positions: list[int], last_row: torch.Tensor) -> None:
        scores = last_row[[positions.index(self.start + j) for j in kept]]
        self.scores[index] = scores
        self.selections[index] = sorted(kept[rank] for rank in scores.topk(keep).indices)


@torch.no_grad()
def shortened_generate(
    model: Any, token_ids: list[int], stages: Sequence[OracleStage], rule: Rule, max_tokens: int
) -> tuple[list[int], torch.Tensor, Shortened]:
    shortened = Shortened(model, token_ids, pixels(1))
    generated: list[int] = []
    logits = []
    for _ in range(max_tokens):
        logits.append(shortened.logits(generated, stages, rule))
        generated.append(int(logits[-1].argmax()))
    return generated, torch.stack(logits), shortened


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("token_ids", "num_images"), [(PROMPT, 1), (TWO_IMAGES, 2), (ADJACENT_IMAGES, 2)])
def test_keeping_all_equals_the_dense_model(
    model: LlavaForConditionalGeneration, token_ids: list[int], num_images: int
) -> None:
    images = pixels(num_images)
    expected_ids, expected = dense_generate(model, token_ids, images, 4)
    for first_layers in [(0,), (0, 2, 3)]:
        stages = [OracleStage(layer, (V,) * num_images) for layer in first_layers]
        result = Oracle(model).generate(token_ids, images, stages, "attention_next", 4)
        assert result.token_ids == expected_ids
        assert result.selections == {}
        assert_close(result.logits, expected)


def test_a_text_prompt_equals_the_dense_model(model: LlavaForConditionalGeneration) -> None:
    expected_ids, expected = dense_generate(model, TEXT_ONLY, None, 4)
    stages = [OracleStage(0, ()), OracleStage(2, ())]
    result = Oracle(model).generate(TEXT_ONLY, None, stages, "attention_next", 4)
    assert result.token_ids == expected_ids
    assert_close(result.logits, expected)


@pytest.mark.parametrize(
    ("stages", "rule"),
    [
        (HIDROP, "attention_next"),
        (HIDROP, "attention_previous"),
        (FASTV, "attention_previous"),
        (PYRAMID, "attention_next"),
    ],
)
def test_masked_rows_equal_rows_that_are_physically_gone(
    model: LlavaForConditionalGeneration, stages: list[OracleStage], rule: Rule
) -> None:
    result = Oracle(model).generate(PROMPT, pixels(1), stages, rule, 5)
    ids, logits, shortened = shortened_generate(model, PROMPT, stages, rule, 5)
    assert {layer: kept[0] for layer, kept in result.selections.items()} == shortened.selections
    for layer, expected in shortened.scores.items():
        scores = result.scores[layer][0]
        assert_close(scores[~scores.isnan()], expected)
    assert result.token_ids == ids
    assert_close(result.logits, logits, 1e-4)
    dense = Oracle(model).generate(PROMPT, pixels(1), [OracleStage(0, (V,))], rule, 1)
    assert (result.logits[0] - dense.logits[0]).abs().max() > 1e-2, "pruning must matter"


def test_layers_without_vision_do_not_depend_on_the_image(
    llama: LlavaForConditionalGeneration,
) -> None:
    one, other = (Oracle(llama).generate(PROMPT, pixels(1, seed), HIDROP, "attention_next", 1) for seed in (0, 1))
    text = torch.tensor(PROMPT) != IMAGE_TOKEN
    for layer in (0, 1):  # the text keys of layer 1 come from rows that layer 0 computed
        assert torch.equal(one.keys[layer][text], other.keys[layer][text])
    assert not torch.allclose(one.keys[2][text], other.keys[2][text], atol=1e-3)


def test_without_vision_the_text_keeps_the_hole_in_its_positions(
    llama: LlavaForConditionalGeneration,
) -> None:
    blind = [OracleStage(0, (0,))]
    results = [Oracle(llama).generate(PROMPT, pixels(1, s), blind, "random", 3) for s in (0, 1)]
    assert torch.equal(results[0].logits, results[1].logits)
    text = [p for p, token in enumerate(PROMPT) if token != IMAGE_TOKEN]
    assert torch.equal(results[0].visible[3].nonzero().flatten(), torch.tensor(text))
    with torch.no_grad():
        ids = torch.tensor([[PROMPT[p] for p in text]])
        with_hole = llama(input_ids=ids, position_ids=torch.tensor([text])).logits[0, -1]
        closed = llama(input_ids=ids).logits[0, -1]
    assert_close(results[0].logits[0], with_hole)
    assert not torch.allclose(closed, with_hole, atol=1e-3)


def test_injected_vision_is_the_raw_projector_output(llama: LlavaForConditionalGeneration) -> None:
    result = Oracle(llama).generate(PROMPT, pixels(1), HIDROP, "attention_next", 1)
    text_model: Any = llama.model.language_model
    with torch.no_grad():
        features = llama.get_image_features(pixel_values=pixels(1)).pooler_output[0]
        layer = text_model.layers[1]
        expected = layer.self_attn.v_proj(layer.input_layernorm(features)).view(V, 4, 16)
    assert_close(result.values[1][3 : 3 + V], expected)
    assert [int(visible.sum()) - len(PROMPT) + V for visible in result.visible] == [
        0, V, 9, 9, 3, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("rule", ["attention_next", "attention_previous", "random", "uniform"])
@pytest.mark.parametrize("token_ids", [TWO_IMAGES, ADJACENT_IMAGES])
def test_each_of_two_images_is_cut_by_its_own_count(
    llama: LlavaForConditionalGeneration, token_ids: list[int], rule: Rule
) -> None:
    stages = [OracleStage(0, (V, 0)), OracleStage(2, (10, V)), OracleStage(3, (10, 4))]
    result = Oracle(llama).generate(token_ids, pixels(2), stages, rule, 2)
    assert [[len(kept) for kept in result.selections[layer]] for layer in (2, 3)] == [
        [10, V],
        [10, 4],
    ]
    assert result.selections[2][0] == result.selections[3][0]
    image_rows = [p for p, token in enumerate(token_ids) if token == IMAGE_TOKEN]
    second = {image_rows[V + j] for j in result.selections[3][1]}
    visible = set(result.visible[4].nonzero().flatten().tolist())
    assert visible & set(image_rows[V:]) == second


def test_two_images_equal_hugging_face_with_a_mask_when_the_second_is_hidden(
    llama: LlavaForConditionalGeneration,
) -> None:
    stages = [OracleStage(0, (V, 0))]
    result = Oracle(llama).generate(TWO_IMAGES, pixels(2), stages, "random", 1)
    mask = torch.ones(1, len(TWO_IMAGES), dtype=torch.long)
    mask[0, V + 3 : 2 * V + 3] = 0
    with torch.no_grad():
        expected = llama(
            input_ids=torch.tensor([TWO_IMAGES]),
            pixel_values=pixels(2),
            attention_mask=mask,
            position_ids=torch.arange(len(TWO_IMAGES))[None],
        ).logits[0, -1]
    assert_close(result.logits[0], expected)


def test_attention_scores_are_a_share_of_the_whole_visible_sequence(
    llama: LlavaForConditionalGeneration,
) -> None:
    result = Oracle(llama).generate(PROMPT, pixels(1), HIDROP, "attention_next", 1)
    first, second = result.scores[2][0], result.scores[4][0]
    assert 0 < float(first.sum()) < 1
    assert first.max() > 2 * first.median(), "attention must not be flat"
    survivors = result.selections[2][0]
    assert (~second.isnan()).nonzero().flatten().tolist() == survivors
    assert result.selections[4][0] == [survivors[i] for i in top_indices(second[survivors], 3)]


@pytest.mark.parametrize(("rule", "layer"), [("attention_next", 3), ("attention_previous", 2)])
def test_scores_of_two_images_are_the_attention_of_hugging_face(
    llama: LlavaForConditionalGeneration, rule: Rule, layer: int
) -> None:
    stages = [OracleStage(0, (V, V)), OracleStage(3, (5, 9))]
    result = Oracle(llama).generate(TWO_IMAGES, pixels(2), stages, rule, 1)
    with torch.no_grad():
        ids = torch.tensor([TWO_IMAGES])
        dense: Any = llama(input_ids=ids, pixel_values=pixels(2), output_attentions=True)
    last_row = dense.attentions[layer][0, :, -1].mean(dim=0)
    for image, (start, keep) in enumerate([(1, 5), (V + 3, 9)]):
        scores = last_row[start : start + V]
        assert_close(result.scores[3][image], scores)
        assert result.selections[3][image] == sorted(scores.topk(keep).indices.tolist())


def test_keys_and_values_are_those_of_the_hugging_face_cache(
    model: LlavaForConditionalGeneration,
) -> None:
    result = Oracle(model).generate(PROMPT, pixels(1), [OracleStage(0, (V,))], "random", 1)
    with torch.no_grad():
        cache: Any = model(input_ids=torch.tensor([PROMPT]), pixel_values=pixels(1)).past_key_values
    for layer in range(NUM_LAYERS):
        assert_close(result.keys[layer], cache.layers[layer].keys[0].transpose(0, 1))
        assert_close(result.values[layer], cache.layers[layer].values[0].transpose(0, 1))


def test_random_draws_by_original_index_and_layer(llama: LlavaForConditionalGeneration) -> None:
    stages = [OracleStage(0, (V,)), OracleStage(2, (8,)), OracleStage(3, (4,))]
    result = Oracle(llama).generate(PROMPT, pixels(1), stages, "random", 1, seed=5)
    at_two, at_three = random_scores(5, 2, V), random_scores(5, 3, V)
    first = sorted(sorted(range(V), key=lambda j: -float(at_two[j]))[:8])
    assert result.selections[2] == [first]
    assert result.selections[3] == [sorted(sorted(first, key=lambda j: -float(at_three[j]))[:4])]


def test_uniform_takes_ranks_among_the_survivors(llama: LlavaForConditionalGeneration) -> None:
    stages = [OracleStage(0, (5,)), OracleStage(3, (2,))]
    result = Oracle(llama).generate(PROMPT, pixels(1), stages, "uniform", 1)
    assert result.selections == {0: [[1, 4, 8, 11, 14]], 3: [[4, 11]]}


def test_random_scores_are_the_documented_numbers() -> None:
    expected = torch.tensor([0.025540150665761763, 0.743307414363619, 0.8134414030342721])
    assert_close(random_scores(3, 2, 3), expected, 1e-7)  # numpy 2.x PCG64, seed [3, 2]
    assert random_scores(3, 2, 3).dtype == torch.float32


@pytest.mark.parametrize(
    ("num_survivors", "keep", "expected"),
    [(4, 2, [1, 3]), (5, 2, [1, 3]), (7, 3, [1, 3, 5]), (3, 3, [0, 1, 2]), (9, 1, [4])],
)
def test_uniform_indices_are_hand_checked(num_survivors: int, keep: int, expected: list[int]) -> None:
    assert uniform_indices(num_survivors, keep) == expected


def test_of_equal_scores_the_lowest_index_wins() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.2, 0.2])
    assert top_indices(scores, 3) == [1, 2, 3]
    assert top_indices(scores, 4) == [1, 2, 3, 4]
    assert top_indices(torch.zeros(50), 3) == [0, 1, 2]


def test_the_mask_shows_visible_rows_of_the_past_and_the_row_itself() -> None:
    visible = torch.tensor([False, True, False, True])
    assert (additive_mask(visible) == 0).int().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
    ]


def test_generation_ends_with_the_first_stop_id(llama: LlavaForConditionalGeneration) -> None:
    free = Oracle(llama).generate(PROMPT, pixels(1), FASTV, "random", 5)
    stop = free.token_ids[2]
    stopped = Oracle(llama).generate(PROMPT, pixels(1), FASTV, "random", 5, stop_ids={stop})
    end = free.token_ids.index(stop) + 1
    assert stopped.token_ids == free.token_ids[:end]
    assert torch.equal(stopped.logits, free.logits[:end])


@pytest.mark.parametrize(
    "stages",
    [
        [],
        [OracleStage(1, (V,))],
        [OracleStage(0, (V,)), OracleStage(NUM_LAYERS, (3,))],
        [OracleStage(0, (V,)), OracleStage(2, (9,)), OracleStage(2, (3,))],
        [OracleStage(0, (V, V))],
        [OracleStage(0, (V + 1,))],
        [OracleStage(0, (-1,))],
        [OracleStage(0, (0,)), OracleStage(2, (5,))],
        [OracleStage(0, (4,)), OracleStage(2, (5,))],
        [OracleStage(0, (V,)), OracleStage(2, (0,)), OracleStage(3, (V,))],
    ],
)
def test_stages_without_a_meaning_are_refused(stages: list[OracleStage]) -> None:
    with pytest.raises(ValueError, match=r"must|may|keep"):
        check_stages(stages, [V], NUM_LAYERS)


def test_prompts_without_a_meaning_are_refused(llama: LlavaForConditionalGeneration) -> None:
    oracle, stages = Oracle(llama), [OracleStage(0, (V,))]
    with pytest.raises(ValueError, match="end with text"):
        oracle.generate(PROMPT[: 3 + V], pixels(1), stages, "random", 1)
    with pytest.raises(ValueError, match="15 image tokens"):
        oracle.generate([1, *[IMAGE_TOKEN] * 15, 2], pixels(1), stages, "random", 1)
    with pytest.raises(ValueError, match="layer 0"):
        oracle.generate(PROMPT, pixels(1), [OracleStage(0, (3,))], "attention_previous", 1)


def test_a_saved_checkpoint_gives_the_same_result(llama: LlavaForConditionalGeneration, tmp_path: Any) -> None:
    llama.save_pretrained(tmp_path)
    loaded = Oracle(tmp_path).generate(PROMPT, pixels(1), HIDROP, "attention_next", 2)
    expected = Oracle(llama).generate(PROMPT, pixels(1), HIDROP, "attention_next", 2)
    assert loaded.selections == expected.selections
    assert_close(loaded.logits, expected.logits)
