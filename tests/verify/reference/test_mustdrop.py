"""The MustDrop oracle against Hugging Face itself: dense where nothing goes, shortened sequences elsewhere.

``Shortened`` is the second opinion: it really gathers rows in the tower and in the language model, calls the
layers of Hugging Face, judges by their own attention weights, and decodes from a real cache that it cuts.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from vllm_hidrop.verify.reference.attention import Kept
from vllm_hidrop.verify.reference.mustdrop import (
    MustDropOracle,
    MustDropResult,
    dual_filter,
)
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings, check_settings
from vllm_hidrop.verify.reference.mustdrop_tower import (
    KeySet,
    key_set,
    merge_windows,
    similarity,
    smallest,
    window_patches,
)
from vllm_hidrop.verify.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, NUM_LAYERS, make_llava
from vllm_hidrop.verify.tiny_models import TOKENS_PER_IMAGE as V

SIDE = 8
BETWEEN = [20, 21, 22]
PROMPT = [1, 5, 7, *[IMAGE_TOKEN] * V, 11, 12, 13, 3]
TWO_IMAGES = [1, *[IMAGE_TOKEN] * V, *BETWEEN, *[IMAGE_TOKEN] * V, 11, 12]
ADJACENT_IMAGES = [1, *[IMAGE_TOKEN] * (2 * V), 11, 12]
PROMPTS = [(PROMPT, 1), (TWO_IMAGES, 2), (ADJACENT_IMAGES, 2)]

FILTERS = MustDropSettings(0.014, 0.03, (1, 3, 4), merge_threshold=None)
ALL_STAGES = replace(FILTERS, merge_threshold=0.24, merge_window=2)
NO_KEYS = replace(FILTERS, key_rate=0)
SETTINGS = [
    FILTERS,
    ALL_STAGES,
    replace(ALL_STAGES, cut_cache=False),
    replace(ALL_STAGES, key_layer="feature", key_rate=0.2, merge_threshold=0.22, merge_window=4),
    replace(ALL_STAGES, key_rate=0, filter_layers=(0, NUM_LAYERS - 1)),
    replace(NO_KEYS, global_threshold=2, individual_threshold=2, filter_layers=(2, 5)),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def load(directory: Any) -> LlavaForConditionalGeneration:
    model: Any = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    return load(make_llava(tmp_path_factory.mktemp("models") / request.param, request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    return load(make_llava(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    return load(make_llava(tmp_path_factory.mktemp("models") / "siglip", tower="siglip"))


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def dense_generate(
    model: Any, token_ids: list[int], pixel_values: torch.Tensor | None, max_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits by Hugging Face's own generate."""
    input_ids = torch.tensor([token_ids])
    images = {} if pixel_values is None else {"pixel_values": pixel_values}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **images,
    )
    return output.sequences[0, len(token_ids) :].tolist(), torch.cat(output.logits)


class Shortened:
    """One request whose rows and cache entries are physically gathered; nothing is masked but the future."""

    def __init__(self, model: Any, token_ids: list[int], pixel_values: torch.Tensor, settings: MustDropSettings):
        self.model, self.token_ids, self.settings = model, token_ids, settings
        self.text = model.model.language_model
        self.margins: dict[str, list[float]] = {"merge": [], "key": [], "global": [], "individual": []}
        image_positions = [p for p, token in enumerate(token_ids) if token == IMAGE_TOKEN]
        self.starts = image_positions[::V]
        encoded = [self.encode(image) for image in pixel_values]
        self.features = [features for features, _, _ in encoded]
        self.alive = [alive for _, alive, _ in encoded]
        self.keys = [keys for _, _, keys in encoded]
        self.kept: list[Kept] = []
        self.logits: list[torch.Tensor] = []

    def merge(self, patches: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The rows that are left of [V, C], and which patches they are."""
        window, threshold = self.settings.merge_window, self.settings.merge_threshold
        rows = dict(enumerate(patches))
        if threshold is None:
            return patches, list(rows)
        grid = torch.arange(V).view(SIDE, SIDE)
        for block in (b for band in grid.split(window, 0) for b in band.split(window, 1)):
            members = patches[block.flatten()]
            cosines = torch.nn.functional.cosine_similarity(members[:, None], members[None], dim=-1)
            score = float(cosines[~torch.eye(window**2, dtype=torch.bool)].mean())
            self.margins["merge"].append(abs(score - threshold))
            if score >= threshold:
                for patch in block.flatten().tolist():
                    del rows[patch]
                rows[int(block[-1, -1])] = members.mean(dim=0)
        alive = sorted(rows)
        return torch.stack([rows[patch] for patch in alive]), alive

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        """Features of the patches that are left, these patches, and the key patches."""
        tower = self.model.model.vision_tower
        layers = tower.encoder.layers
        hidden = tower.embeddings(image[None])
        is_clip = hasattr(tower, "pre_layrnorm")
        hidden = layers[0](tower.pre_layrnorm(hidden) if is_clip else hidden, None)
        rows, alive = self.merge(hidden[0, is_clip:])
        hidden = torch.cat([hidden[:, :is_clip], rows[None]], dim=1)
        states, weights = [hidden], [torch.empty(0)]
        for layer in layers[1:]:
            weights.append(layer.self_attn(layer.layer_norm1(states[-1]), None)[1][0])
            states.append(layer(states[-1], None))
        features = self.model.model.multi_modal_projector(states[-2][0, is_clip:])
        keys: list[int] = []
        if self.settings.key_rate:
            scores = weights[-1 if self.settings.key_layer == "last" else -2][:, 0, 1:].mean(dim=0)
            num_keys = math.ceil(self.settings.key_rate * len(alive))
            order = scores.argsort(descending=True)
            keys = sorted(alive[rank] for rank in order[:num_keys].tolist())
            self.margins["key"].append(float(scores[order[num_keys - 1]] - scores[order[num_keys]]))
        return features, alive, keys

    def present(self, positions: list[int]) -> Kept:
        return [[p - start for p in positions if start <= p < start + V] for start in self.starts]

    def dropped(self, attention: torch.Tensor, positions: list[int]) -> set[int]:
        """Positions that go, judged by ``attention`` [rows, rows], token by token."""
        gamma, alpha = self.settings.global_threshold, self.settings.individual_threshold
        gone = set()
        for image, start in enumerate(self.starts):
            judges = [r for r, p in enumerate(positions) if p >= start + V and self.token_ids[p] != IMAGE_TOKEN]
            columns = {p: r for r, p in enumerate(positions) if start <= p < start + V}
            paid = {p: [float(attention[judge, column]) for judge in judges] for p, column in columns.items()}
            total = sum(sum(amounts) for amounts in paid.values())
            for position, amounts in paid.items():
                if position - start in self.keys[image]:
                    continue
                self.margins["global"].append(abs(sum(amounts) - gamma * total) / total)
                self.margins["individual"].append(abs(max(amounts) - alpha))
                if sum(amounts) < gamma * total and max(amounts) < alpha:
                    gone.add(position)
        return gone

    def prefill(self) -> tuple[DynamicCache, list[list[int]], list[int]]:
        """The cache, the positions in it per layer, and the positions after the last filter."""
        alive = {start + patch for start, patches in zip(self.starts, self.alive, strict=True) for patch in patches}
        positions = [p for p, token in enumerate(self.token_ids) if token != IMAGE_TOKEN or p in alive]
        rows = {p: self.text.embed_tokens(torch.tensor(self.token_ids[p])) for p in positions}
        for start, patches, features in zip(self.starts, self.alive, self.features, strict=True):
            rows |= {start + patch: feature for patch, feature in zip(patches, features, strict=True)}
        hidden = torch.stack([rows[p] for p in positions])[None]
        cache, held = DynamicCache(), []
        for index, layer in enumerate(self.text.layers):
            held.append(positions)
            rope = self.text.rotary_emb(hidden, torch.tensor([positions]))
            causal = torch.full((len(positions),) * 2, -torch.inf).triu(1)[None, None]
            normed = layer.input_layernorm(hidden)
            _, weights = layer.self_attn(normed, position_embeddings=rope, attention_mask=causal)
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rope, past_key_values=cache)
            if index in self.settings.filter_layers:
                gone = self.dropped(weights[0].mean(dim=0), positions)
                left = [row for row, p in enumerate(positions) if p not in gone]
                hidden, positions = hidden[:, left], [positions[row] for row in left]
        self.logits.append(self.model.lm_head(self.text.norm(hidden[0, -1])))
        self.kept = [self.present(of_layer) for of_layer in held]
        return cache, held, positions

    @torch.no_grad()
    def generate(self, max_tokens: int) -> list[int]:
        cache, held, survivors = self.prefill()
        layers: Any = cache.layers
        if self.settings.cut_cache:
            for index in range(self.settings.filter_layers[0], NUM_LAYERS):
                rows = [row for row, p in enumerate(held[index]) if p in survivors]
                layers[index].keys = layers[index].keys[:, :, rows]
                layers[index].values = layers[index].values[:, :, rows]
        generated = [int(self.logits[-1].argmax())]
        while len(generated) < max_tokens:
            hidden = self.text.embed_tokens(torch.tensor([generated[-1:]]))
            position = len(self.token_ids) + len(generated) - 1
            rope = self.text.rotary_emb(hidden, torch.tensor([[position]]))
            for layer in self.text.layers:
                hidden = layer(hidden, position_embeddings=rope, past_key_values=cache)
            self.logits.append(self.model.lm_head(self.text.norm(hidden[0, -1])))
            generated.append(int(self.logits[-1].argmax()))
        return generated


def assert_equals_shortened(
    model: Any, token_ids: list[int], num_images: int, settings: MustDropSettings
) -> MustDropResult:
    result = MustDropOracle(model).generate(token_ids, pixels(num_images), settings, 4)
    with torch.no_grad():
        shortened = Shortened(model, token_ids, pixels(num_images), settings)
    expected_ids = shortened.generate(4)
    assert min(result.margins.values()) > 5e-6, "the decisions must not hang on rounding"
    assert result.alive == shortened.alive
    assert result.keys == shortened.keys
    assert result.kept == shortened.kept
    assert result.token_ids == expected_ids
    assert_close(result.logits, torch.stack(shortened.logits))
    expected = {name: min(values, default=math.inf) for name, values in shortened.margins.items()}
    assert result.margins == pytest.approx(expected, abs=2e-6)
    return result


def counts(result: MustDropResult) -> list[list[int]]:
    return [[len(tokens) for tokens in of_layer] for of_layer in result.kept]


@pytest.mark.parametrize(("token_ids", "num_images"), PROMPTS)
@pytest.mark.parametrize(
    "settings",
    [
        replace(NO_KEYS, filter_layers=()),
        replace(NO_KEYS, individual_threshold=0),
        replace(NO_KEYS, global_threshold=0),
        replace(FILTERS, key_rate=1, merge_threshold=1.1, merge_window=4),
    ],
)
def test_nothing_merged_and_nothing_dropped_equals_the_dense_model(
    model: LlavaForConditionalGeneration, token_ids: list[int], num_images: int, settings: MustDropSettings
) -> None:
    expected_ids, expected = dense_generate(model, token_ids, pixels(num_images), 4)
    result = MustDropOracle(model).generate(token_ids, pixels(num_images), settings, 4)
    assert result.token_ids == expected_ids
    assert_close(result.logits, expected)
    everything = [list(range(V))] * num_images
    assert result.alive == everything
    assert result.kept == [everything] * NUM_LAYERS
    assert result.keys == (everything if settings.key_rate else [[]] * num_images)


def test_a_text_prompt_equals_the_dense_model(llama: LlavaForConditionalGeneration) -> None:
    text = [token for token in PROMPT if token != IMAGE_TOKEN]
    expected_ids, expected = dense_generate(llama, text, None, 4)
    result = MustDropOracle(llama).generate(text, None, ALL_STAGES, 4)
    assert result.token_ids == expected_ids
    assert_close(result.logits, expected)
    assert set(result.margins.values()) == {math.inf}


@pytest.mark.parametrize(("token_ids", "num_images"), PROMPTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_masked_rows_equal_rows_that_are_physically_gone(
    model: LlavaForConditionalGeneration, token_ids: list[int], num_images: int, settings: MustDropSettings
) -> None:
    result = assert_equals_shortened(model, token_ids, num_images, settings)
    dense = dense_generate(model, token_ids, pixels(num_images), 1)[1]
    assert (result.logits[0] - dense[0]).abs().max() > 1e-2, "pruning must matter"


def test_the_settings_compared_reach_every_stage(llama: LlavaForConditionalGeneration) -> None:
    result = MustDropOracle(llama).generate(TWO_IMAGES, pixels(2), ALL_STAGES, 1)
    first, second, third, last = (result.kept[layer] for layer in (1, 2, 4, 5))
    for image in range(2):
        assert V > len(first[image]) > len(second[image]) > len(third[image]) > len(last[image])
        assert set(result.keys[image]) < set(last[image])
    without = MustDropOracle(llama).generate(TWO_IMAGES, pixels(2), replace(ALL_STAGES, key_rate=0), 1)
    assert not set(result.keys[0]) <= set(without.kept[-1][0]), "a key token must need its protection"
    assert without.keys == [[], []]


def test_siglip_merges_and_filters_without_keys(siglip: LlavaForConditionalGeneration) -> None:
    dense = replace(NO_KEYS, filter_layers=())
    result = MustDropOracle(siglip).generate(PROMPT, pixels(1), dense, 4)
    assert_close(result.logits, dense_generate(siglip, PROMPT, pixels(1), 4)[1])
    result = assert_equals_shortened(siglip, PROMPT, 1, replace(ALL_STAGES, key_rate=0))
    assert 0 < counts(result)[-1][0] < len(result.alive[0]) < V
    with pytest.raises(ValueError, match="class token"):
        MustDropOracle(siglip).generate(PROMPT, pixels(1), FILTERS, 1)


def test_windows_are_blocks_of_the_grid_and_end_at_the_bottom_right() -> None:
    assert window_patches(4, 2) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert window_patches(3, 3) == [list(range(9))]


def test_similarity_is_the_mean_cosine_of_all_pairs() -> None:
    right, up, left = [1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]
    assert float(similarity(torch.tensor([right, right]))) == pytest.approx(1)
    assert float(similarity(torch.tensor([right, up, right, up]))) == pytest.approx(1 / 3)
    assert float(similarity(torch.tensor([right, up, left]))) == pytest.approx(-1 / 3)


def test_windows_at_the_threshold_merge_into_their_bottom_right_patch() -> None:
    patches = torch.zeros(16, 2)
    patches[[0, 1, 4, 5]] = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [8.0, 0.0]])  # similarity 1
    patches[[2, 3, 6, 7]] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # 1/3
    patches[[8, 9, 12, 13]] = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])  # -1/3
    patches[[10, 11, 14, 15]] = torch.tensor([[0.0, 3.0], [0.0, 3.0], [0.0, 3.0], [0.0, 1.0]])  # 1
    merged = merge_windows(patches, 1.0, 2)
    assert merged.alive == [2, 3, 5, 6, 7, 8, 9, 12, 13, 15]
    assert merged.patches[5].tolist() == [3.75, 0]
    assert merged.patches[15].tolist() == [0, 2.5]
    unmerged = [2, 3, 6, 7, 8, 9, 12, 13]
    assert torch.equal(merged.patches[unmerged], patches[unmerged])
    assert merged.margin == 0
    assert merge_windows(patches, 0.4, 2).margin == pytest.approx(0.4 - 1 / 3)
    assert merge_windows(patches, -1, 4).alive == [15]


def test_a_window_without_a_direction_does_not_merge() -> None:
    patches = torch.full((4, 2), torch.nan)
    merged = merge_windows(patches, -1.0, 2)
    assert merged.alive == [0, 1, 2, 3]
    assert merged.margin == 0


def test_images_merge_on_their_own(llama: LlavaForConditionalGeneration) -> None:
    flat = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.stack([pixels(1)[0], flat])
    settings = replace(FILTERS, merge_threshold=0.24, merge_window=2)
    result = MustDropOracle(llama).generate(TWO_IMAGES, images, settings, 1)
    alone = [MustDropOracle(llama).generate(PROMPT, image[None], settings, 1) for image in images]
    assert result.alive == [one.alive[0] for one in alone]
    assert result.keys == [one.keys[0] for one in alone]
    assert len(result.alive[0]) != len(result.alive[1])


def test_keys_are_a_rounded_up_share_of_what_is_alive() -> None:
    scores = torch.tensor([0.9, 0.1, 0.4, 0.3, 0.4, 0.4, 0.2])
    alive = [1, 2, 3, 4, 5, 6]
    assert key_set(scores, alive, 1 / 6).patches == [2]
    assert key_set(scores, alive, 0.2).patches == [2, 4]
    assert key_set(scores, alive, 0.2).margin == 0
    assert key_set(scores, alive, 0.6).patches == [2, 3, 4, 5]
    assert key_set(scores, alive, 0.6).margin == pytest.approx(0.1)
    assert key_set(scores, alive, 1) == KeySet(alive, math.inf)


@pytest.mark.parametrize(("key_layer", "index"), [("last", 2), ("feature", 1)])
def test_keys_have_the_most_attention_of_the_class_token(
    llama: LlavaForConditionalGeneration, key_layer: Any, index: int
) -> None:
    settings = replace(FILTERS, key_layer=key_layer)
    result = MustDropOracle(llama).generate(TWO_IMAGES, pixels(2), settings, 1)
    tower: Any = llama.model.vision_tower
    with torch.no_grad():
        attention = tower(pixels(2), output_attentions=True).attentions[index][:, :, 0, 1:].mean(dim=1)
    assert result.keys == [sorted(row.topk(6).indices.tolist()) for row in attention]  # ceil(0.08 * 64)
    other = replace(settings, key_layer="feature" if key_layer == "last" else "last")
    assert result.keys != MustDropOracle(llama).generate(TWO_IMAGES, pixels(2), other, 1).keys


def test_each_protection_alone_rescues_a_token() -> None:
    # Sums 0.1, 0.7, 0.1, 0.1 of 1; strongest 0.05, 0.35, 0.1, 0.05.
    attention = torch.tensor([[0.05, 0.35, 0.1, 0.05], [0.05, 0.35, 0.0, 0.05]])
    none, last = torch.zeros(4, dtype=torch.bool), torch.tensor([False, False, False, True])
    assert dual_filter(attention, none, 0.2, 0.5).goes.tolist() == [True, False, True, True]
    assert dual_filter(attention, none, 0.2, 0.08).goes.tolist() == [True, False, False, True]
    assert dual_filter(attention, last, 0.2, 0.08).goes.tolist() == [True, False, False, False]
    assert dual_filter(attention, none, 0.8, 0.5).goes.tolist() == [True] * 4
    assert dual_filter(attention, none, 0.8, 0.0).goes.tolist() == [False] * 4
    assert dual_filter(attention, none, 0.0, 0.5).goes.tolist() == [False] * 4


def test_a_token_at_a_threshold_stays() -> None:
    attention, none = torch.tensor([[0.25, 0.5, 0.25]]), torch.zeros(3, dtype=torch.bool)
    assert dual_filter(attention, none, 0.25, 1.0).goes.tolist() == [False] * 3
    assert dual_filter(attention, none, 1.0, 0.25).goes.tolist() == [False] * 3
    assert dual_filter(attention, none, 0.26, 0.26).goes.tolist() == [True, False, True]


def test_attention_that_is_not_a_number_drops_nothing() -> None:
    attention = torch.tensor([[0.1, torch.nan], [0.1, 0.1]])
    verdict = dual_filter(attention, torch.zeros(2, dtype=torch.bool), 1.0, 1.0)
    assert verdict.goes.tolist() == [False, False]
    assert verdict.global_margin == verdict.individual_margin == 0


def test_margins_leave_key_tokens_out() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.2], [0.1, 0.4, 0.0]])
    verdict = dual_filter(attention, torch.tensor([True, False, False]), 0.3, 0.15)
    assert verdict.global_margin == pytest.approx(0.1)
    assert verdict.individual_margin == pytest.approx(0.05)
    verdict = dual_filter(attention, torch.ones(3, dtype=torch.bool), 0.3, 0.15)
    assert verdict.global_margin == verdict.individual_margin == math.inf
    assert smallest(torch.tensor([math.inf])) == math.inf


def test_an_image_may_go_altogether(llama: LlavaForConditionalGeneration) -> None:
    settings = replace(NO_KEYS, global_threshold=2, individual_threshold=2, filter_layers=(2, 5))
    result = MustDropOracle(llama).generate(PROMPT, pixels(1), settings, 1)
    assert counts(result) == [[V], [V], [V], [0], [0], [0], [0], [0]]


def test_text_after_an_image_judges_it(llama: LlavaForConditionalGeneration) -> None:
    settings = replace(NO_KEYS, filter_layers=(2,))
    result = MustDropOracle(llama).generate(TWO_IMAGES, pixels(2), settings, 1)
    with torch.no_grad():
        ids = torch.tensor([TWO_IMAGES])
        dense: Any = llama(input_ids=ids, pixel_values=pixels(2), output_attentions=True)
    attention = dense.attentions[2][0].mean(dim=0)
    between, tail = [V + 1, V + 2, V + 3], [2 * V + 4, 2 * V + 5]
    for image, (start, judges) in enumerate([(1, between + tail), (V + 4, tail)]):
        paid = attention[judges, start : start + V]
        stays = (paid.sum(dim=0) >= 0.014 * paid.sum()) | (paid.max(dim=0).values >= 0.03)
        assert result.kept[2][image] == list(range(V)), "the judging layer runs on what it judges"
        assert result.kept[3][image] == stays.nonzero().flatten().tolist()
        assert 0 < len(result.kept[3][image]) < V


def test_cutting_the_cache_changes_generated_rows_alone(model: LlavaForConditionalGeneration) -> None:
    cut, uncut = (
        MustDropOracle(model).generate(PROMPT, pixels(1), replace(ALL_STAGES, cut_cache=cut), 2)
        for cut in (True, False)
    )
    assert torch.equal(cut.logits[0], uncut.logits[0])
    assert (cut.logits[1] - uncut.logits[1]).abs().max() > 1e-2
    assert (cut.alive, cut.keys, cut.kept) == (uncut.alive, uncut.keys, uncut.kept)


def test_the_cut_starts_at_the_first_filter_layer(llama: LlavaForConditionalGeneration) -> None:
    """A filter of the last layer leaves that layer alone to be cut."""
    last = replace(NO_KEYS, filter_layers=(NUM_LAYERS - 1,), global_threshold=2, individual_threshold=2)
    result = MustDropOracle(llama).generate(PROMPT, pixels(1), last, 2)
    assert counts(result) == [[V]] * NUM_LAYERS
    seen = []
    handle = llama.model.language_model.layers[NUM_LAYERS - 1].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        llama(input_ids=torch.tensor([[*PROMPT, *result.token_ids[:1]]]), pixel_values=pixels(1))
        handle.remove()
        text: Any = llama.model.language_model
        rows = [p for p in range(len(PROMPT) + 1) if p == len(PROMPT) or PROMPT[p] != IMAGE_TOKEN]
        hidden = seen[0][:, rows]
        rope = text.rotary_emb(hidden, torch.tensor([rows]))
        causal = torch.full((len(rows),) * 2, -torch.inf).triu(1)[None, None]
        hidden = text.layers[-1](hidden, attention_mask=causal, position_embeddings=rope)
        expected = llama.lm_head(text.norm(hidden[0, -1]))
    assert_close(result.logits[1], expected)


def test_generation_ends_with_the_first_stop_id(llama: LlavaForConditionalGeneration) -> None:
    free = MustDropOracle(llama).generate(PROMPT, pixels(1), ALL_STAGES, 5)
    stop = free.token_ids[2]
    stopped = MustDropOracle(llama).generate(PROMPT, pixels(1), ALL_STAGES, 5, stop_ids={stop})
    end = free.token_ids.index(stop) + 1
    assert stopped.token_ids == free.token_ids[:end]
    assert torch.equal(stopped.logits, free.logits[:end])


@pytest.mark.parametrize(
    "settings",
    [
        replace(FILTERS, filter_layers=(3, 1)),
        replace(FILTERS, filter_layers=(1, 1)),
        replace(FILTERS, filter_layers=(-1,)),
        replace(FILTERS, filter_layers=(NUM_LAYERS,)),
        replace(FILTERS, key_rate=-0.1),
        replace(FILTERS, key_rate=1.1),
        replace(FILTERS, key_layer="first"),  # type: ignore[arg-type]
    ],
)
def test_settings_without_a_meaning_are_refused(settings: MustDropSettings) -> None:
    with pytest.raises(ValueError, match=r"filter layers|key rate|key layer"):
        check_settings(settings, NUM_LAYERS)


@pytest.mark.parametrize(("num_patches", "window"), [(64, 3), (64, 1), (64, 0), (60, 2)])
def test_windows_must_divide_the_grid(num_patches: int, window: int) -> None:
    with pytest.raises(ValueError, match="must divide"):
        merge_windows(torch.ones(num_patches, 2), 0.8, window)


def test_the_default_window_is_refused_only_where_it_merges(llama: LlavaForConditionalGeneration) -> None:
    assert FILTERS.merge_window == 3
    MustDropOracle(llama).generate(PROMPT, pixels(1), FILTERS, 1)
    with pytest.raises(ValueError, match="3 x 3 must divide"):
        MustDropOracle(llama).generate(PROMPT, pixels(1), replace(FILTERS, merge_threshold=0.8), 1)


def test_prompts_without_a_meaning_are_refused(llama: LlavaForConditionalGeneration) -> None:
    oracle = MustDropOracle(llama)
    with pytest.raises(ValueError, match="end with text"):
        oracle.generate(PROMPT[: 3 + V], pixels(1), FILTERS, 1)
    with pytest.raises(ValueError, match="end with text"):
        oracle.generate([], None, FILTERS, 1)
    with pytest.raises(ValueError, match="63 image tokens"):
        oracle.generate([1, *[IMAGE_TOKEN] * (V - 1), 2], pixels(1), FILTERS, 1)
    with pytest.raises(ValueError, match="at least 1"):
        oracle.generate(PROMPT, pixels(1), FILTERS, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_feature_layer", [-2, -1]),
        ("vision_feature_layer", 1),
        ("vision_feature_layer", -3),
        ("vision_feature_layer", 4),
        ("vision_feature_select_strategy", "full"),
    ],
)
def test_features_without_a_meaning_are_refused(
    llama: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.setattr(llama.config, name, value)
    with pytest.raises(ValueError, match="the features must"):
        MustDropOracle(llama)


def test_a_saved_checkpoint_gives_the_same_result(llama: LlavaForConditionalGeneration, tmp_path: Any) -> None:
    loaded = MustDropOracle(make_llava(tmp_path / "llama")).generate(PROMPT, pixels(1), ALL_STAGES, 2)
    expected = MustDropOracle(llama).generate(PROMPT, pixels(1), ALL_STAGES, 2)
    assert loaded.kept == expected.kept
    assert_close(loaded.logits, expected.logits)
    with pytest.raises(ValueError, match="float32"):
        MustDropOracle(LlavaForConditionalGeneration.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16))
