"""The VisiPruner oracle against Hugging Face: dense without a trigger, gathered rows and edited values elsewhere.

``SecondOpinion`` really gathers rows, and makes the shallow edits by other values instead of other weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.oracles.masked import Prompt
from tests.oracles.renumbered import project_heads
from tests.oracles.visipruner import VisiPrunerOracle, VisiPrunerResult, layer_weights
from vllm_hidrop.verify.reference.attention import Heads
from vllm_hidrop.verify.reference.visipruner import (
    Decisions,
    Form,
    Sink,
    VisiPrunerSettings,
    check_settings,
    contributions,
    cosines,
    softmax_of,
)
from vllm_hidrop.verify.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, NUM_LAYERS, make_llava
from vllm_hidrop.verify.tiny_models import TOKENS_PER_IMAGE as V

ONE_IMAGE = [1, 5, 7, *[IMAGE_TOKEN] * V, 11, 12, 13, 9]
TWO_IMAGES = [1, 5, 7, *[IMAGE_TOKEN] * V, 11, 12, *[IMAGE_TOKEN] * V, 13, 14, 9]
ADJACENT_IMAGES = [1, 6, *[IMAGE_TOKEN] * (2 * V), 11, 9]
TEXT_ONLY = [1, 5, 7, 11, 12, 13, 9]
ALL = list(range(V))
NOTHING_TRIGGERS = VisiPrunerSettings(1, cosine=-2.0, stages=("middle", "deep"))
BUSY = VisiPrunerSettings(1, cosine=0.93, norm=0.5, exit_cosine=0.9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def build_model(directory: Path, text: str, tower: str) -> Any:
    checkpoint = make_llava(directory / text, text, tower)
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(
    scope="module", params=[("llama", "clip"), ("mistral", "siglip"), ("qwen2", "clip")], ids=lambda p: p[0]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_model(tmp_path_factory.mktemp("model"), *request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_model(tmp_path_factory.mktemp("model"), "llama", "clip")


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def generate(model: Any, token_ids: list[int], settings: VisiPrunerSettings, max_tokens: int = 3) -> VisiPrunerResult:
    images = pixels(token_ids.count(IMAGE_TOKEN) // V) if IMAGE_TOKEN in token_ids else None
    return VisiPrunerOracle(model).generate(token_ids, images, settings, max_tokens)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


class SecondOpinion:
    """One request with the ``kept`` sets given: only the rows that exist, plain layers by Hugging Face itself.

    In substituting layers a row class calls attention with its own values: zero for what it must not get, those of the
    image's first token for a sink. After the prompt pass ``output`` [E] and ``without`` (per image [kept, E]) hold, per
    plain layer, the last row's attention output, and the same with one weight at a time set to zero.
    """

    def __init__(self, model: Any, token_ids: list[int], settings: VisiPrunerSettings, kept: list[list[list[int]]]):
        self.model = model
        self.text = model.model.language_model
        self.token_ids, self.settings, self.kept = token_ids, settings, kept
        rows = [row for row, token in enumerate(token_ids) if token == IMAGE_TOKEN]
        self.image_rows = [rows[start : start + V] for start in range(0, len(rows), V)]
        self.place = {row: (image, j) for image, own in enumerate(self.image_rows) for j, row in enumerate(own)}
        self.output: dict[int, torch.Tensor] = {}
        self.without: dict[int, list[torch.Tensor]] = {}

    @torch.no_grad()
    def logits(self, generated: list[int]) -> torch.Tensor:
        ids = torch.tensor([*self.token_ids, *generated])
        hidden = self.text.embed_tokens(ids)
        images = pixels(len(self.image_rows))
        hidden[list(self.place)] = torch.cat(list(self.model.get_image_features(pixel_values=images).pooler_output))
        positions = list(range(len(ids)))
        for index, kept in enumerate(self.kept):
            exists = [p for p in positions if p not in self.place or self.place[p][1] in kept[self.place[p][0]]]
            hidden = hidden[[positions.index(p) for p in exists]]
            positions = exists
            hidden = self.layer(index, hidden, positions)
        return self.model.lm_head(self.text.norm(hidden[-1]))

    def layer(self, index: int, hidden: torch.Tensor, positions: list[int]) -> torch.Tensor:
        settings, layer = self.settings, self.text.layers[index]
        sees = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
        if index < settings.shallow_layers:
            sees &= torch.tensor([[self.sees(index, row, column) for column in positions] for row in positions])
        mask = torch.zeros_like(sees, dtype=torch.float32).masked_fill(~sees, -torch.inf)
        rope = self.text.rotary_emb(hidden[None], torch.tensor([positions]))
        is_edited = "shallow" in settings.stages and index < settings.shallow_layers
        if is_edited and settings.form == "substitution":
            attended = self.substituted(index, hidden, positions, mask, rope)
            hidden = hidden + layer.self_attn.o_proj(attended)
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if positions[-1] == len(self.token_ids) - 1:
            self.measure(index, hidden, positions, mask, rope)
        return layer(hidden[None], attention_mask=mask[None, None], position_embeddings=rope)[0]

    def sees(self, index: int, row: int, column: int) -> bool:
        """Whether shallow layer ``index`` lets a row look at a column before it."""
        settings, num_prompt = self.settings, len(self.token_ids)
        if column not in self.place:
            return True
        if row >= num_prompt:
            return not settings.drop_shallow_kv
        if settings.form == "substitution" or "shallow" not in settings.stages:
            return True
        if row in self.place:
            return index > 0
        j = self.place[column][1]
        return index == 0 and (j == 0 if settings.sink == "first" else j >= V // 2)

    def substituted(
        self, index: int, hidden: torch.Tensor, positions: list[int], mask: torch.Tensor, rope: Any
    ) -> torch.Tensor:
        query, key, value = project_heads(self.text.layers[index], hidden, rope[0][0], rope[1][0])
        for_text, for_vision = value.clone(), value.clone()
        for rows in self.image_rows:
            if index > 0:
                for_text[:, rows] = 0
            elif self.settings.sink == "first":
                for_text[:, rows] = value[:, rows[:1]]
            else:
                for_text[:, rows[: V // 2]] = 0
            if index == 0:
                for_vision[:, rows] = 0
        groups = len(query) // len(key)
        of_text, of_vision, plain = (
            torch.nn.functional.scaled_dot_product_attention(
                query, key.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0), attn_mask=mask
            )
            .transpose(0, 1)
            .flatten(1)
            for values in (for_text, for_vision, value)
        )
        is_vision = torch.tensor([p in self.place for p in positions])[:, None]
        is_prompt = torch.tensor([p < len(self.token_ids) for p in positions])[:, None]
        return torch.where(is_prompt, torch.where(is_vision, of_vision, of_text), plain)

    def measure(self, index: int, hidden: torch.Tensor, positions: list[int], mask: torch.Tensor, rope: Any) -> None:
        layer = self.text.layers[index]
        normed = layer.input_layernorm(hidden[None])
        attention = layer.self_attn
        captured: list[torch.Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0][0, -1]))
        _, weights = attention(normed, position_embeddings=rope, attention_mask=mask[None, None])
        hook.remove()
        value = attention.v_proj(normed)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        value = value.repeat_interleave(weights.shape[1] // len(value), dim=0)
        self.output[index] = captured[0]
        self.without[index] = []
        for rows in self.image_rows:
            one_less = []
            for column, position in enumerate(positions):
                if position in rows:
                    edited = weights[0, :, -1].clone()
                    edited[:, column] = 0
                    one_less.append((edited[:, None] @ value).flatten())
            self.without[index].append(torch.stack(one_less) if one_less else torch.empty(0, len(captured[0])))

    def cosines(self, layer: int, image: int) -> torch.Tensor:
        return torch.cosine_similarity(self.without[layer][image], self.output[layer][None], dim=1)

    def norms(self, layer: int, image: int) -> torch.Tensor:
        return (self.without[layer][image] - self.output[layer]).norm(dim=1)


def second_opinion(model: Any, token_ids: list[int], settings: VisiPrunerSettings, result: VisiPrunerResult) -> Any:
    """Check the logits of ``result`` and return what was measured on the way."""
    other = SecondOpinion(model, token_ids, settings, result.kept)
    logits = [other.logits(result.token_ids[:count]) for count in reversed(range(len(result.token_ids)))]
    assert_close(result.logits, torch.stack(logits[::-1]))
    return other


def expected_decisions(other: SecondOpinion, image: int, settings: VisiPrunerSettings) -> dict[str, Any]:
    """The story of one image, told from measured statistics: where it was cut, to what, where it left."""
    tested = range(settings.shallow_layers + 1, NUM_LAYERS - 1, settings.test_every)
    cut = next((layer for layer in tested if other.cosines(layer, image).min() < settings.cosine), None)
    if cut is None:
        return {"cut": None, "kept": ALL, "exit": None}
    kept = [j for j, norm in enumerate(other.norms(cut, image).tolist()) if norm > settings.norm]
    passes = 0
    for layer in (layer for layer in tested if layer > cut and kept):
        is_passed = not (other.cosines(layer, image) < settings.exit_cosine).any()
        passes = passes + 1 if is_passed else 0
        if passes == settings.exit_count:
            return {"cut": cut + 1, "kept": kept, "exit": layer + 1}
    return {"cut": cut + 1, "kept": kept, "exit": None}


@pytest.mark.parametrize("token_ids", [TEXT_ONLY, ONE_IMAGE, TWO_IMAGES, ADJACENT_IMAGES])
@pytest.mark.parametrize("settings", [NOTHING_TRIGGERS, replace(NOTHING_TRIGGERS, shallow_layers=0, stages=())])
def test_without_a_trigger_it_is_hugging_faces_own_generation(
    model: Any, token_ids: list[int], settings: VisiPrunerSettings
) -> None:
    num_images = token_ids.count(IMAGE_TOKEN) // V
    result = generate(model, token_ids, settings, 4)
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **({"pixel_values": pixels(num_images)} if num_images else {}),
        )
    assert result.token_ids == expected.sequences[0, len(token_ids) :].tolist()
    assert_close(result.logits, torch.cat(expected.logits))
    assert result.kept == [[ALL] * num_images] * NUM_LAYERS
    assert result.cut_layers == result.exit_layers == [None] * num_images


@pytest.mark.parametrize("token_ids", [TWO_IMAGES, ADJACENT_IMAGES])
@pytest.mark.parametrize("sink", ["first", "half"])
@pytest.mark.parametrize("form", ["substitution", "pre_softmax"])
def test_shallow_edits_equal_attention_with_other_values_or_a_mask(
    model: Any, token_ids: list[int], sink: Sink, form: Form
) -> None:
    settings = VisiPrunerSettings(3, stages=("shallow",), sink=sink, form=form)
    result = generate(model, token_ids, settings)
    second_opinion(model, token_ids, settings, result)
    assert result.kept == [[ALL] * (token_ids.count(IMAGE_TOKEN) // V)] * NUM_LAYERS
    dense = generate(model, token_ids, replace(settings, stages=()))
    other_form = replace(settings, form="substitution" if form == "pre_softmax" else "pre_softmax")
    other_sink = replace(settings, sink="half" if sink == "first" else "first")
    layer_zero_alone = replace(settings, shallow_layers=1)
    variants = [dense, *(generate(model, token_ids, s, 1) for s in (other_form, other_sink, layer_zero_alone))]
    assert all(differ(result.logits[0], variant.logits[0]) for variant in variants), "every choice must matter"


def test_no_shallow_layer_is_no_edit(llama: Any) -> None:
    edited = generate(llama, ONE_IMAGE, replace(NOTHING_TRIGGERS, shallow_layers=0, stages=("shallow", "middle")))
    assert torch.equal(edited.logits, generate(llama, ONE_IMAGE, NOTHING_TRIGGERS).logits)


@pytest.mark.parametrize("form", ["substitution", "pre_softmax"])
@pytest.mark.parametrize("stages", [("shallow",), ()])
def test_dropped_shallow_kv_is_seen_by_the_prompt_alone(model: Any, form: Form, stages: tuple[str, ...]) -> None:
    settings = VisiPrunerSettings(3, stages=stages, form=form, drop_shallow_kv=True)
    result = generate(model, TWO_IMAGES, settings)
    second_opinion(model, TWO_IMAGES, settings, result)
    held = generate(model, TWO_IMAGES, replace(settings, drop_shallow_kv=False))
    assert torch.equal(result.logits[0], held.logits[0])
    assert differ(result.logits[1], held.logits[1])


@pytest.mark.parametrize("token_ids", [ONE_IMAGE, TWO_IMAGES, ADJACENT_IMAGES])
@pytest.mark.parametrize(
    "settings",
    [
        BUSY,
        replace(BUSY, shallow_layers=2, form="pre_softmax", sink="half", exit_count=1),
        replace(BUSY, stages=("middle", "deep"), test_every=2, exit_count=1),
        replace(BUSY, stages=("middle",), shallow_layers=0, norm=1.5),
    ],
)
def test_decisions_and_logits_equal_those_of_gathered_rows(
    model: Any, token_ids: list[int], settings: VisiPrunerSettings
) -> None:
    result = generate(model, token_ids, settings)
    assert min(result.margins.values()) > 1e-5, "a near tie: choose other thresholds"
    other = second_opinion(model, token_ids, settings, result)
    for image in range(len(result.cut_layers)):
        expected = expected_decisions(other, image, settings)
        if "deep" not in settings.stages:
            expected["exit"] = None
        assert result.cut_layers[image] == expected["cut"]
        assert result.exit_layers[image] == expected["exit"]
        for layer, kept in enumerate(result.kept):
            is_cut = expected["cut"] is not None and layer >= expected["cut"]
            has_left = expected["exit"] is not None and layer >= expected["exit"]
            assert kept[image] == ([] if has_left else expected["kept"] if is_cut else ALL)
    assert result.margins["cosine"] == pytest.approx(smallest_middle_distance(other, result, settings), abs=1e-5)


def smallest_middle_distance(other: SecondOpinion, result: VisiPrunerResult, settings: VisiPrunerSettings) -> float:
    distances = []
    for image, cut in enumerate(result.cut_layers):
        end = NUM_LAYERS - 1 if cut is None else cut
        for layer in range(settings.shallow_layers + 1, end, settings.test_every):
            distances.append(float((other.cosines(layer, image) - settings.cosine).abs().min()))
    return min(distances)


def test_the_busy_settings_reach_every_stage(model: Any) -> None:
    result = generate(model, ADJACENT_IMAGES, BUSY, 1)
    assert result.cut_layers[0] != result.cut_layers[1], "each image has its own test"
    assert None in result.exit_layers
    assert result.exit_layers != [None, None]
    assert any(0 < len(tokens) < V for kept in result.kept for tokens in kept)
    for other in (replace(BUSY, stages=("shallow",)), replace(BUSY, stages=("shallow", "middle"))):
        assert differ(result.logits, generate(model, ADJACENT_IMAGES, other, 1).logits)


@pytest.mark.parametrize(("shallow_layers", "first_tested"), [(0, 1), (1, 2), (3, 4), (5, 6)])
@pytest.mark.parametrize("stages", [("middle",), ("shallow", "middle")])
def test_the_first_test_is_one_layer_after_the_plain_one(
    llama: Any, shallow_layers: int, first_tested: int, stages: tuple[str, ...]
) -> None:
    settings = VisiPrunerSettings(shallow_layers, cosine=2.0, norm=-1.0, stages=stages)
    result = generate(llama, TWO_IMAGES, settings, 1)
    assert result.cut_layers == [first_tested + 1] * 2
    assert result.kept == [[ALL] * 2] * NUM_LAYERS, "norm -1 keeps all; the cut is reported all the same"


def test_the_last_layer_is_not_tested(llama: Any) -> None:
    result = generate(llama, ONE_IMAGE, VisiPrunerSettings(NUM_LAYERS - 2, cosine=2.0), 1)
    assert result.cut_layers == [None]
    assert result.margins == {"cosine": torch.inf, "norm": torch.inf, "exit": torch.inf}


@pytest.mark.parametrize("stages", [("deep",), ("shallow", "deep"), ("shallow",), ()])
def test_without_middle_there_is_neither_cut_nor_exit(llama: Any, stages: tuple[str, ...]) -> None:
    settings = VisiPrunerSettings(1, 2.0, exit_cosine=-2.0, stages=stages, filter_layer=3, exit_layer=5)
    result = generate(llama, ONE_IMAGE, settings, 1)
    assert result.kept == [[ALL]] * NUM_LAYERS
    assert (result.cut_layers, result.exit_layers) == ([None], [None])


def test_an_empty_cut_takes_the_image_away_without_an_exit(llama: Any) -> None:
    result = generate(llama, ONE_IMAGE, VisiPrunerSettings(1, cosine=2.0, norm=1e9, stages=("middle", "deep")))
    assert [len(kept[0]) for kept in result.kept] == [V, V, V, 0, 0, 0, 0, 0]
    assert (result.cut_layers, result.exit_layers) == ([3], [None])
    assert result.margins["exit"] == torch.inf


def test_a_calibrated_cut_keeps_the_longest_contributions(model: Any) -> None:
    settings = VisiPrunerSettings(1, 2.0, stages=("middle",), filter_layer=4, keep=5, test_every=2)
    result = generate(model, TWO_IMAGES, settings, 2)
    other = second_opinion(model, TWO_IMAGES, settings, result)
    for image in range(2):
        longest = sorted(other.norms(4, image).topk(5).indices.tolist())
        assert [kept[image] for kept in result.kept] == [ALL] * 5 + [longest] * 3
    gaps = [norms[4] - norms[5] for norms in (other.norms(4, i).sort(descending=True).values for i in range(2))]
    assert result.margins["norm"] == pytest.approx(float(min(gaps)), abs=1e-4)
    assert result.margins["cosine"] == torch.inf, "no test was made"


def test_a_fixed_exit_takes_what_remains(llama: Any) -> None:
    settings = VisiPrunerSettings(1, -2.0, exit_cosine=-2.0, exit_count=1, stages=("middle", "deep"), exit_layer=6)
    for filter_layer, cut in [(None, None), (3, 4), (5, 6)]:
        changed = replace(settings, filter_layer=filter_layer)
        result = generate(llama, TWO_IMAGES, changed)
        assert (result.cut_layers, result.exit_layers) == ([cut] * 2, [6, 6])
        assert result.margins["exit"] == torch.inf, "no test was made"
        counts = [[len(tokens) for tokens in kept] for kept in result.kept]
        assert counts == [[V, V]] * min(cut or 6, 6) + [[16, 16]] * (6 - (cut or 6)) + [[0, 0]] * 2
        second_opinion(llama, TWO_IMAGES, changed, result)
    gone = generate(llama, TWO_IMAGES, replace(settings, filter_layer=3, keep=0), 1)
    assert gone.exit_layers == [None, None], "there was nothing left to take"


def test_a_smaller_margin_is_seen(llama: Any) -> None:
    other = SecondOpinion(llama, ONE_IMAGE, NOTHING_TRIGGERS, [[ALL]] * NUM_LAYERS)
    generate(llama, ONE_IMAGE, NOTHING_TRIGGERS, 1)
    other.logits([])
    lowest = float(other.cosines(2, 0).min())
    near = replace(NOTHING_TRIGGERS, cosine=lowest + 1e-3, norm=float(other.norms(2, 0)[9]) - 1e-3)
    result = generate(llama, ONE_IMAGE, near, 1)
    assert result.cut_layers == [3]
    assert 0 < result.margins["cosine"] < 1.1e-3
    assert 0 < result.margins["norm"] < 1.1e-3
    assert generate(llama, ONE_IMAGE, replace(near, cosine=lowest - 1e-3), 1).cut_layers != [3]


# -- edits of weights, by hand: 2 text, 4 vision (2 images of 2), 1 text, 1 generated row --

IMAGE_ROWS = [torch.tensor([2, 3]), torch.tensor([4, 5])]


def flat_weights(layer: int, settings: VisiPrunerSettings) -> torch.Tensor:
    """[8, 8] in units of 1 / (row + 1): every visible column weighs the same before the edit."""
    flat = Heads(torch.zeros(1, 8, 4), torch.randn(1, 8, 4), torch.randn(1, 8, 4))
    prompt = Prompt(torch.zeros(7, 4), IMAGE_ROWS, [])
    weights = layer_weights(layer, flat, prompt, [[0, 1], [0, 1]], settings)[0]
    return weights * torch.arange(1, 9)[:, None]


def test_layer_zero_merges_each_image_onto_its_first_column() -> None:
    assert_close(
        flat_weights(0, VisiPrunerSettings(2)),
        torch.tensor(
            [
                [1, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0],
                [1, 1, 2, 0, 2, 0, 1, 0],
                [1, 1, 1, 1, 1, 1, 1, 1.0],
            ]
        ),
    )


def test_layer_zero_with_half_a_sink_leaves_the_second_halves() -> None:
    weights = flat_weights(0, VisiPrunerSettings(2, sink="half"))
    assert_close(weights[6:], torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0], [1.0] * 8]))
    assert_close(weights[:6], flat_weights(0, VisiPrunerSettings(2))[:6])


def test_later_shallow_layers_take_vision_from_text_rows_alone() -> None:
    weights = flat_weights(1, VisiPrunerSettings(2))
    assert_close(weights[6], torch.tensor([1, 1, 0, 0, 0, 0, 1, 0.0]))
    plain = torch.ones(8, 8).tril()
    assert_close(weights[[*range(6), 7]], plain[[*range(6), 7]])
    assert float(weights[6].sum() / 7) == pytest.approx(3 / 7), "not renormalised"
    for settings in (VisiPrunerSettings(1), VisiPrunerSettings(2, stages=("middle", "deep"))):
        assert_close(flat_weights(1, settings), plain)


@pytest.mark.parametrize(("layer", "sink", "last_text"), [(0, "first", 5), (0, "half", 5), (1, "first", 3)])
def test_before_softmax_the_rest_is_renormalised(layer: int, sink: Sink, last_text: int) -> None:
    substituted = flat_weights(layer, VisiPrunerSettings(2, sink=sink))
    masked = flat_weights(layer, VisiPrunerSettings(2, sink=sink, form="pre_softmax")) / torch.arange(1, 9)[:, None]
    assert torch.equal(substituted > 0, masked > 0), "the same columns in both forms"
    assert_close(masked.sum(dim=1), torch.ones(8))
    assert_close(masked[6][masked[6] > 0], torch.full((last_text,), 1 / last_text))


def test_dropped_shallow_columns_are_hidden_from_generated_rows() -> None:
    for form in ("substitution", "pre_softmax"):
        settings = VisiPrunerSettings(2, form=form, drop_shallow_kv=True)
        held = replace(settings, drop_shallow_kv=False)
        assert_close(flat_weights(1, settings)[7] / 8, torch.tensor([1, 1, 0, 0, 0, 0, 1, 1]) / 4)
        assert_close(flat_weights(1, settings)[:7], flat_weights(1, held)[:7])
        assert_close(flat_weights(2, settings), torch.ones(8, 8).tril())


def test_a_row_that_sees_nothing_gets_nothing(llama: Any) -> None:
    heads = Heads(torch.zeros(2, 2, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, 4))
    mask = torch.tensor([[-torch.inf, -torch.inf], [0, -torch.inf]])
    assert softmax_of(heads, mask).tolist() == [[[0, 0], [1, 0]]] * 2
    image_first = [*[IMAGE_TOKEN] * V, 11, 12]
    result = generate(llama, image_first, VisiPrunerSettings(2, form="pre_softmax", stages=("shallow",)), 2)
    assert bool(result.logits.isfinite().all())


# -- statistics and decisions, by hand --


def test_a_contribution_concatenates_weighted_values_of_all_heads() -> None:
    weights = torch.tensor([[0.5, 0.0, 0.25], [0.1, 1.0, 0.0]])
    value = torch.tensor([[[2.0, 4.0], [1.0, 1.0], [8.0, 0.0]], [[10.0, 0.0], [3.0, 5.0], [7.0, 7.0]]])
    assert_close(contributions(weights, value), torch.tensor([[1.0, 2.0, 1.0, 0.0], [0, 0, 3, 5], [2, 0, 0, 0]]), 1e-7)


def test_cosines_are_hand_checked() -> None:
    output = torch.tensor([1.0, 0.0])
    vectors = torch.tensor([[0.0, 0.0], [0.4, -0.8], [2.0, 0.0], [1.0, -1.0], [1.0, 0.0]])
    result = cosines(output, vectors)
    assert_close(result[:4], torch.tensor([1.0, 0.6, -1.0, 0.0], dtype=torch.float64), 1e-6)
    assert result[4].isnan(), "without its only contribution the output has no direction"


OUTPUT = torch.tensor([1.0, 0.0])
ALIGNED = [0.25, 0.0]  # without it the direction is the same: cosine 1
ACROSS = [0.0, 1.0]  # cosine 1 / sqrt(2)
LONG = [0.0, 3.0]  # cosine 1 / sqrt(10)


def decide(settings: VisiPrunerSettings, layers: list[list[list[float]]], num_layers: int = 20) -> Decisions:
    """Decisions for one image, whose tokens contribute ``layers[i]`` in layer i."""
    decisions = Decisions(settings, [len(layers[0])], num_layers)
    for index, vectors in enumerate(layers):
        decisions.kept_in(index)
        decisions.observe(index, OUTPUT, [torch.tensor(vectors)])
    decisions.kept_in(len(layers))
    return decisions


def test_any_token_below_triggers_and_long_ones_stay() -> None:
    quiet, loud = [ALIGNED, [0.5, 0.0], [0.0, 0.0]], [ALIGNED, ACROSS, [0.125, 0.0]]
    decisions = decide(VisiPrunerSettings(0, cosine=0.9), [loud, quiet, quiet, loud, loud])
    assert decisions.cut_layers == [4]
    assert decisions.kept == [[[0, 1, 2]]] * 4 + [[[0, 1]]] * 2
    assert decisions.margins["cosine"] == pytest.approx(0.1), "1 - 0.9 of an aligned one"
    assert decisions.margins["norm"] == pytest.approx(0.05), "0.25 - 0.2, also of an aligned one"


def test_statistics_at_a_threshold_neither_trigger_nor_stay() -> None:
    at = float(cosines(OUTPUT, torch.tensor([ACROSS]))[0])
    layers = [[ACROSS, ALIGNED]] * 3
    assert decide(VisiPrunerSettings(0, cosine=at), layers).cut_layers == [None]
    assert decide(VisiPrunerSettings(0, cosine=at + 1e-9), layers).cut_layers == [2]
    assert decide(VisiPrunerSettings(0, cosine=0.9, norm=0.25), layers).kept[2] == [[0]]
    assert decide(VisiPrunerSettings(0, cosine=0.9, norm=1.0), layers).kept[2] == [[]]
    exits = VisiPrunerSettings(0, cosine=0.9, norm=0.5, exit_cosine=at, exit_count=1)
    assert decide(exits, layers).exit_layers == [3], "at the threshold is not below"
    assert decide(replace(exits, exit_cosine=at + 1e-9), layers).exit_layers == [None]


def test_numbers_that_are_none_decide_nothing() -> None:
    broken = [[torch.nan, 0.0], ACROSS]
    nothing = [[torch.nan, 0.0], ALIGNED]
    settings = VisiPrunerSettings(0, cosine=0.9, exit_cosine=0.9, exit_count=1)
    assert decide(settings, [nothing] * 4).cut_layers == [None]
    assert decide(settings, [nothing, broken, broken]).kept[2] == [[1]]
    alone = [[1.0, 0.0], ACROSS]  # the first is the whole output: NaN
    decisions = decide(settings, [alone, alone, [[1.0, 0.0], ALIGNED], alone])
    assert decisions.kept[2] == [[0, 1]]
    assert decisions.exit_layers == [3], "NaN does not fail the exit test"
    calibrated = VisiPrunerSettings(0, filter_layer=1, keep=2)
    assert decide(calibrated, [broken, broken]).kept[2] == [[1]]


@pytest.mark.parametrize(
    ("after_cut", "consecutive", "cumulative"),
    [("PP", 4, 4), ("PFP", None, 5), ("FPFPP", 7, 6), ("FFF", None, None), ("P", None, None), ("PFPFFPP", 9, 5)],
)
def test_exit_counts_passes_in_a_row_or_in_all(after_cut: str, consecutive: int | None, cumulative: int | None) -> None:
    passing, failing = [[0.9, 0.0], ALIGNED], [[0.9, 0.0], ACROSS]
    layers = [failing, failing, *(passing if letter == "P" else failing for letter in after_cut)]
    for is_consecutive, expected in [(True, consecutive), (False, cumulative)]:
        decisions = decide(VisiPrunerSettings(0, exit_consecutive=is_consecutive), layers)
        assert decisions.cut_layers == [2]
        assert decisions.exit_layers == [expected]
        assert [len(kept[0]) for kept in decisions.kept[2:]] == [
            2 if expected is None or layer < expected else 0 for layer in range(2, len(layers) + 1)
        ]


def test_tokens_that_left_at_the_cut_do_not_fail_the_exit() -> None:
    loud, quiet = [[0.0, 0.1], ACROSS], [LONG, ALIGNED]
    assert decide(VisiPrunerSettings(0), [loud, loud, quiet, quiet]).exit_layers == [4]
    assert decide(VisiPrunerSettings(0, norm=0.05), [loud, loud, quiet, quiet]).exit_layers == [None]


def test_only_every_nth_layer_is_tested() -> None:
    loud, quiet = [[0.9, 0.0], ACROSS], [[0.9, 0.0], ALIGNED]
    settings = VisiPrunerSettings(1, test_every=3)  # layers 2, 5, 8, 11, ...
    layers = [loud, loud, quiet, loud, loud, loud, quiet, quiet, quiet, loud, loud, quiet]
    decisions = decide(settings, layers)
    assert (decisions.cut_layers, decisions.exit_layers) == ([6], [12]), "layers between neither pass nor fail"
    assert decide(settings, layers, num_layers=13).exit_layers == [12]
    assert decide(settings, layers, num_layers=12).exit_layers == [None], "11 is the last layer"


def test_a_calibrated_cut_takes_the_lowest_of_equal_norms_and_may_keep_all() -> None:
    layer = [[0.1, 0.0], [0.0, 0.3], [0.2, 0.0], [0.0, -0.3], [0.3, 0.0]]
    settings = VisiPrunerSettings(0, cosine=2.0, test_every=2, filter_layer=2, keep=2)
    decisions = decide(settings, [layer] * 4)
    assert decisions.cut_layers == [3]
    assert decisions.kept[2:] == [[[0, 1, 2, 3, 4]], [[1, 3]], [[1, 3]]]
    assert decisions.margins["norm"] == 0
    decisions = decide(replace(settings, keep=9), [layer] * 4)
    assert (decisions.cut_layers, decisions.kept[3]) == ([3], [[0, 1, 2, 3, 4]])
    assert decide(replace(settings, keep=0), [layer] * 4).kept[3] == [[]]


def test_exit_tests_go_on_after_a_calibrated_cut() -> None:
    settings = VisiPrunerSettings(0, test_every=2, filter_layer=2, keep=1)  # tests in layers 3, 5
    quiet = [[0.9, 0.0], ALIGNED]
    assert decide(settings, [quiet] * 6).exit_layers == [6]


def test_each_image_has_its_own_cut_and_count() -> None:
    loud, quiet = torch.tensor([LONG, ACROSS]), torch.tensor([ALIGNED, [0.5, 0.0]])
    decisions = Decisions(VisiPrunerSettings(0, cosine=0.9), [2, 2, 2], 10)
    for layer, second in enumerate([quiet, quiet, loud, loud, quiet, quiet]):
        decisions.kept_in(layer)
        decisions.observe(layer, OUTPUT, [loud if layer < 2 else quiet, second, quiet])
    assert decisions.cut_layers == [2, 3, None]
    assert decisions.exit_layers == [4, 6, None]
    assert decisions.kept_in(6) == [[], [], [0, 1]]


# -- input --


@pytest.mark.parametrize(
    "change",
    [
        {"shallow_layers": -1},
        {"shallow_layers": 9},
        {"stages": ("middle", "late")},
        {"stages": ("middle", "middle")},
        {"sink": "last"},
        {"form": "none"},
        {"test_every": 0},
        {"exit_count": 0},
        {"keep": -1},
        {"filter_layer": 2},
        {"filter_layer": NUM_LAYERS - 1},
        {"exit_layer": 2},
        {"exit_layer": NUM_LAYERS},
    ],
)
def test_settings_without_a_meaning_are_refused(change: dict[str, Any]) -> None:
    check_settings(VisiPrunerSettings(2, filter_layer=3, exit_layer=3), NUM_LAYERS)
    with pytest.raises(ValueError, match=r"must|unknown"):
        check_settings(replace(VisiPrunerSettings(2), **change), NUM_LAYERS)


def test_prompts_without_a_meaning_are_refused(llama: Any) -> None:
    oracle, settings = VisiPrunerOracle(llama), VisiPrunerSettings(2)
    with pytest.raises(ValueError, match="end with text"):
        oracle.generate(ONE_IMAGE[: 3 + V], pixels(1), settings, 1)
    with pytest.raises(ValueError, match="63 image tokens"):
        oracle.generate([1, *[IMAGE_TOKEN] * 63, 9], pixels(1), settings, 1)
    with pytest.raises(ValueError, match="max_tokens"):
        oracle.generate(ONE_IMAGE, pixels(1), settings, 0)
    with pytest.raises(ValueError, match="shallow_layers"):
        oracle.generate(ONE_IMAGE, pixels(1), VisiPrunerSettings(NUM_LAYERS + 1), 1)


def test_generation_ends_with_the_first_stop_id(llama: Any) -> None:
    free = generate(llama, ONE_IMAGE, BUSY, 5)
    stop = free.token_ids[2]
    stopped = VisiPrunerOracle(llama).generate(ONE_IMAGE, pixels(1), BUSY, 5, stop_ids={stop})
    end = free.token_ids.index(stop) + 1
    assert stopped.token_ids == free.token_ids[:end]
    assert torch.equal(stopped.logits, free.logits[:end])
