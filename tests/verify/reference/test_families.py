"""The reference for any family against Hugging Face's own forward, on tiny models with M-RoPE, deepstack, other norms.

``hooked`` is the second opinion for pruned prompts: the whole model of Hugging Face, whose layers get another
mask and, where images enter late, other rows; no row is dropped and every position id is Hugging Face's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLVideoProcessor,
)
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from vllm_hidrop.verify.reference.decoder import Recorded, _attend, _no_mask
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.pruning import Settings, StagedSettings
from vllm_hidrop.verify.reference.shortened import Prepared, Reference, Result, Span
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.reference.visipruner import VisiPrunerSettings

START, END, IMAGE, VIDEO, VIDEO_START, VIDEO_END = range(120, 126)
NUM_LAYERS = 6
NUM_TOKENS = 4
TOLERANCE = 1e-4
SIZE = {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 8 * 128 * 128}}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128, "patch_size": 8}


@dataclass(frozen=True)
class Family:
    """A model and the processors of its pixels."""

    make: Callable[[], Any]
    images: Any
    videos: Any = None


def rope(section: list[int], **others: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section} | others


def qwen2_5_vl() -> Any:
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope([4, 6, 6])},
        vision_config=TOWER | {"depth": 2, "window_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    levels = {"depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    config = Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 32, "rope_parameters": rope([6, 5, 5], mrope_interleaved=True)},
        vision_config=TOWER | levels,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen3VLForConditionalGeneration(config)


def glm4v() -> Any:
    config = Glm4vConfig(
        text_config=TEXT | {"rope_parameters": rope([2, 3, 3], partial_rotary_factor=0.5)},
        vision_config=TOWER | {"depth": 2, "image_size": 64, "spatial_merge_size": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )
    return Glm4vForConditionalGeneration(config)


FAMILIES = {
    "qwen2_5_vl": Family(qwen2_5_vl, Qwen2VLImageProcessor(**SIZE), Qwen2VLVideoProcessor(**SIZE)),
    "qwen3_vl": Family(qwen3_vl, Qwen2VLImageProcessor(**SIZE), Qwen3VLVideoProcessor(**SIZE)),
    "glm4v": Family(glm4v, Glm4vImageProcessor(**SIZE)),
}


class Dense(NamedTuple):
    """``logits`` [vocabulary] of the last row, and what it pays to all rows [T] in each layer, mean over heads."""

    logits: torch.Tensor
    attention: list[torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """A model and a prompt: two images of different sizes, or an image and a video whose frames are spans."""

    model: Any
    token_ids: list[int]
    inputs: Mapping[str, Any]
    spans: list[Span]

    def run(self, settings: Settings | None, reference: type[Reference] = Reference, num_tokens: int = 1) -> Result:
        judge = reference(self.model)
        return judge.run(judge.prepared(self.token_ids, self.inputs), self.spans, settings, num_tokens)

    @torch.no_grad()
    def hugging_face(self, generated: list[int] | None = None) -> Dense:
        """By the model's own forward, with its own attention."""
        self.model.get_decoder().config._attn_implementation = "eager"
        more = generated or []
        types = torch.nn.functional.pad(self.inputs["mm_token_type_ids"], (0, len(more)))
        ids = torch.tensor([self.token_ids + more])
        inputs = {**self.inputs, "mm_token_type_ids": types}
        output = self.model(input_ids=ids, output_attentions=True, **inputs)
        return Dense(output.logits[0, -1], [weights[0, :, -1].mean(dim=0) for weights in output.attentions])


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def ask(model: Any, family: Family, with_video: bool) -> Asked:
    pictures = [Image.fromarray(noise(1, 64, 96)), Image.fromarray(noise(2, 112, 80))][: 1 if with_video else 2]
    inputs = dict(family.images(images=pictures, return_tensors="pt"))
    token_ids = [1, 5, 6]
    for _, height, width in inputs["image_grid_thw"].tolist():
        token_ids += [START, *[IMAGE] * (height * width // 4), END, 7, 8, 9]
    if with_video:
        inputs |= family.videos(videos=[noise(3, 4, 64, 64)], do_sample_frames=False, return_tensors="pt")
        frames, height, width = inputs["video_grid_thw"][0].tolist()
        frame = [VIDEO] * (height * width // 4)
        is_split = isinstance(family.videos, Qwen3VLVideoProcessor)  # by timestamps
        token_ids += [30, START, *frame, END] * frames if is_split else [START, *frame * frames, END]
        token_ids += [10, 11]
    types = [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in token_ids]
    inputs["mm_token_type_ids"] = torch.tensor([types])
    runs = [list(run) for kind, run in groupby(range(len(types)), types.__getitem__) if kind]
    return Asked(model, token_ids, inputs, [(run[0], run[-1] + 1) for run in runs])


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen2_5_vl-video", "qwen3_vl-video"])
def asked(request: pytest.FixtureRequest) -> Asked:
    name, _, video = request.param.partition("-")
    model = FAMILIES[name].make().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    return ask(model, FAMILIES[name], bool(video))


def staged(asked: Asked, keeps: Mapping[int, float], rule: Rule) -> StagedSettings:
    """Fractions of every span by first layer."""
    sizes = [end - first for first, end in asked.spans]
    return StagedSettings(
        [OracleStage(layer, tuple(int(keep * size) for size in sizes)) for layer, keep in keeps.items()], rule
    )


def fastv(asked: Asked) -> StagedSettings:
    return staged(asked, {0: 1, 2: 0.5}, "attention_previous")


def hidrop(asked: Asked) -> StagedSettings:
    return staged(asked, {0: 0, 2: 1, 3: 0.5, 4: 0.25, 5: 0}, "attention_next")


METHODS: dict[str, Callable[[Asked], Settings]] = {
    "fastv": fastv,
    "hidrop": hidrop,
    "visipruner": lambda _: VisiPrunerSettings(0, cosine=2.0, norm=0.3, exit_cosine=0.98, stages=("middle", "deep")),
    "mustdrop": lambda _: MustDropSettings(0.03, 0.06, (1, 3), merge_threshold=None, key_rate=0, cut_cache=False),
}


@torch.no_grad()
def hooked(asked: Asked, kept: list[list[list[int]]], generated: list[int] | None = None) -> Dense:
    """The model's own forward, where layer i sees the tokens ``kept[i]``."""
    text = asked.model.get_decoder()
    seen: dict[str, Any] = {}

    def remember(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen["levels"] = kwargs.get("deepstack_visual_embeds") or []
        seen["vision"] = kwargs.get("visual_pos_masks")

    def change(layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        if layer == 0:
            seen["embeddings"] = hidden
        num_rows = hidden.shape[1]
        hidden, sees = hidden.clone(), torch.ones(num_rows, num_rows, dtype=torch.bool).tril()
        for (first, end), tokens, before in zip(asked.spans, kept[layer], kept[max(layer - 1, 0)], strict=True):
            gone = sorted(set(range(end - first)) - set(tokens))
            sees[:, [first + token for token in gone]] = False
            if tokens and not before:
                rows = seen["embeddings"].clone()
                for level in seen["levels"][:layer]:
                    rows[seen["vision"]] += level
                hidden[0, first:end] = rows[0, first:end]
        sees |= torch.eye(num_rows, dtype=torch.bool)
        mask = torch.zeros(num_rows, num_rows).masked_fill(~sees, -torch.inf)
        return (hidden,), {**kwargs, "attention_mask": mask[None, None]}

    def layer_hook(layer: int) -> Any:
        return lambda _module, args, kwargs: change(layer, args[0], kwargs)

    hooks = [text.register_forward_pre_hook(remember, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(layer_hook(index), with_kwargs=True) for index, layer in enumerate(text.layers)
    ]
    try:
        return asked.hugging_face(generated)
    finally:
        for hook in hooks:
            hook.remove()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 100 * TOLERANCE)


def test_everything_kept_equals_hugging_face(asked: Asked) -> None:
    result = asked.run(None, num_tokens=NUM_TOKENS)
    for step, logits in enumerate(result.logits):
        assert_close(logits, asked.hugging_face(result.token_ids[:step]).logits)
    inputs = {"input_ids": torch.tensor([asked.token_ids]), **asked.inputs}
    greedy = asked.model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
    assert result.token_ids == greedy[0, len(asked.token_ids) :].tolist()
    sizes = [list(range(end - first)) for first, end in asked.spans]
    assert result.kept == [sizes] * NUM_LAYERS


@pytest.mark.parametrize("method", METHODS)
def test_dropped_rows_equal_hidden_columns_of_the_whole_model(asked: Asked, method: str) -> None:
    result = asked.run(METHODS[method](asked), num_tokens=NUM_TOKENS)
    for step, logits in enumerate(result.logits):
        assert_close(logits, hooked(asked, result.kept, result.token_ids[:step]).logits)
    assert differ(result.logits[0], asked.hugging_face().logits), "something that mattered was dropped"


@pytest.mark.parametrize("method", [fastv, hidrop])
def test_scores_are_the_attention_of_the_model(asked: Asked, method: Callable[[Asked], StagedSettings]) -> None:
    settings = method(asked)
    result = asked.run(settings)
    for layer, of_spans in result.scores.items():
        uncut = [*result.kept[:layer], result.kept[layer - 1], *result.kept[layer + 1 :]]
        scoring = layer if settings.rule == "attention_next" else layer - 1
        attention = hooked(asked, uncut).attention[scoring]
        for span, (scores, (first, end)) in enumerate(zip(of_spans.values(), asked.spans, strict=True)):
            survivors = result.kept[layer - 1][span]
            expected = attention[first:end][survivors]
            torch.testing.assert_close(scores[survivors], expected, rtol=1e-4, atol=1e-6)
            keep = len(result.kept[layer][span])
            chosen = sorted(survivors[rank] for rank in expected.topk(keep).indices)
            assert result.kept[layer][span] == chosen
    assert list(result.scores) == ([2] if method is fastv else [3, 4])


def test_the_token_that_was_kept_last_matters(asked: Asked) -> None:
    result = asked.run(fastv(asked))
    first, end = asked.spans[0]
    tokens = result.kept[2][0]
    other = min(set(range(end - first)) - set(tokens))
    off_by_one = sorted([*tokens[1:], other])
    changed = [[off_by_one, *layer[1:]] if layer[0] == tokens else layer for layer in result.kept]
    assert_close(result.logits[0], hooked(asked, result.kept).logits)
    assert differ(result.logits[0], hooked(asked, changed).logits)


class WrongPositions(Reference):
    """Numbers the rows as text."""

    def _record(self, prepared: Prepared, num_tokens: int) -> Recorded:
        recorded = super()._record(prepared, num_tokens)
        ids = torch.arange(len(recorded.rows)).expand(3, 1, -1)
        wrong = self._decoder._text.rotary_emb(recorded.rows[None], ids)
        recorded.given = [{**given, "position_embeddings": wrong} for given in recorded.given]
        return recorded


class WrongLevels(Reference):
    """Takes the last of the added levels for the first."""

    def _record(self, prepared: Prepared, num_tokens: int) -> Recorded:
        recorded = super()._record(prepared, num_tokens)
        recorded.levels = recorded.levels[::-1]
        return recorded


class LevelsForgotten(Reference):
    """Lets images that enter late do without the levels of the layers before."""

    def _record(self, prepared: Prepared, num_tokens: int) -> Recorded:
        recorded = super()._record(prepared, num_tokens)
        recorded.injected = lambda layer: recorded.rows  # type: ignore[method-assign]
        return recorded


def test_wrong_positions_show(asked: Asked) -> None:
    assert differ(asked.run(None).logits, asked.run(None, WrongPositions).logits)
    assert differ(asked.run(fastv(asked)).logits, asked.run(fastv(asked), WrongPositions).logits)


@pytest.mark.parametrize("asked", ["qwen3_vl", "qwen3_vl-video"], indirect=True)
def test_wrong_levels_show(asked: Asked) -> None:
    assert differ(asked.run(None).logits, asked.run(None, WrongLevels).logits)
    for wrong in (WrongLevels, LevelsForgotten):
        assert differ(asked.run(hidrop(asked)).logits, asked.run(hidrop(asked), wrong).logits)


def test_a_changed_row_between_layers_is_refused(asked: Asked) -> None:
    layers = asked.model.get_decoder().layers
    hook = layers[2].register_forward_pre_hook(lambda _module, args: (args[0] + 1e-3,))
    with pytest.raises(ValueError, match="between layers 1 and 2"):
        asked.run(None)
    hook.remove()


def test_attention_that_is_not_causal_is_refused() -> None:
    _no_mask(q_length=4, mask_function=causal_mask_function)
    _no_mask(q_length=4, mask_function=sliding_window_causal_mask_function(4))
    for not_causal in (sliding_window_causal_mask_function(3), lambda *_: True):
        with pytest.raises(ValueError, match="not causal"):
            _no_mask(q_length=4, mask_function=not_causal)
    heads = torch.zeros(1, 2, 4, 8)
    for options in ({"sliding_window": 3}, {"softcap": 30.0}, {"s_aux": heads}):
        with pytest.raises(ValueError, match=r"window of 3|has no"):
            _attend(None, heads, heads, heads, None, **options)


def test_a_scaling_of_its_own_is_that_of_the_softmax() -> None:
    heads = torch.randn(3, 2, 5, 8)
    query, key, value = heads[:, None]
    output, _ = _attend(None, query, key, value, None, scaling=0.7)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.7)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
