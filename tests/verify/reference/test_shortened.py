"""The reference for any family against those of LLaVA-1.5, which hide columns where this one drops rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from tests.oracles.masked import Oracle
from tests.oracles.visipruner import VisiPrunerOracle
from vllm_hidrop.verify.reference.attention import load_model
from vllm_hidrop.verify.reference.mustdrop import MustDropOracle
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.pruning import StagedSettings
from vllm_hidrop.verify.reference.shortened import Reference, Result, Span, check_spans
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.reference.visipruner import VisiPrunerSettings
from vllm_hidrop.verify.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, NUM_LAYERS, make_llava
from vllm_hidrop.verify.tiny_models import TOKENS_PER_IMAGE as V

ONE_IMAGE = [1, 5, 7, *[IMAGE_TOKEN] * V, 11, 12, 13, 9]
ADJACENT_IMAGES = [1, 6, *[IMAGE_TOKEN] * (2 * V), 11, 9]
PROMPTS = {"one": (ONE_IMAGE, [(3, 3 + V)]), "adjacent": (ADJACENT_IMAGES, [(2, 2 + V), (2 + V, 2 + 2 * V)])}
TEXT_ONLY = [1, 5, 7, 11, 12, 13, 9]
NUM_TOKENS = 3

FASTV = [(0, V), (2, 30)]
PYRAMID = [(0, V), (1, 40), (3, 17), (4, 5)]
HIDROP = [(0, 0), (1, V), (3, 20), (4, 5), (NUM_LAYERS - 1, 0)]
STAGED: list[tuple[list[tuple[int, int]], Rule]] = [
    (FASTV, "attention_previous"),
    (PYRAMID, "attention_previous"),
    (PYRAMID, "attention_next"),
    (HIDROP, "attention_next"),
    (PYRAMID, "random"),
    (HIDROP, "uniform"),
]
BUSY = VisiPrunerSettings(1, cosine=0.93, norm=0.5, exit_cosine=0.9)
VISIPRUNER = [
    BUSY,
    replace(BUSY, shallow_layers=2, sink="half"),
    replace(BUSY, shallow_layers=2, form="pre_softmax", drop_shallow_kv=True),
    replace(BUSY, filter_layer=3, keep=9, exit_layer=5),
]
FILTERS = MustDropSettings(0.014, 0.03, (1, 3, 4), merge_threshold=None, key_rate=0)
MUSTDROP = [FILTERS, replace(FILTERS, cut_cache=False), replace(FILTERS, filter_layers=(0, NUM_LAYERS - 1))]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    checkpoint = make_llava(tmp_path_factory.mktemp("model") / request.param, request.param)
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


def pixels(num_images: int) -> torch.Tensor:
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def run(model: Any, token_ids: list[int], spans: list[Span], settings: Any) -> Result:
    reference = Reference(model)
    return reference.run(
        reference.prepared(token_ids, {"pixel_values": pixels(len(spans))}), spans, settings, NUM_TOKENS
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("keeps", "rule"), STAGED)
def test_dropped_rows_equal_hidden_columns(model: Any, prompt: str, keeps: list[tuple[int, int]], rule: Rule) -> None:
    token_ids, spans = PROMPTS[prompt]
    stages = [OracleStage(layer, (keep,) * len(spans)) for layer, keep in keeps]
    masked = Oracle(model).generate(token_ids, pixels(len(spans)), stages, rule, NUM_TOKENS, seed=4)
    shortened = run(model, token_ids, spans, StagedSettings(stages, rule, seed=4))
    assert shortened.token_ids == masked.token_ids
    assert_close(shortened.logits, masked.logits)
    assert shortened.selections == masked.selections
    for layer, scores in masked.scores.items():
        for image, of_image in scores.items():
            torch.testing.assert_close(shortened.scores[layer][image], of_image, rtol=1e-4, atol=1e-6, equal_nan=True)
    visible = [[layer[first:end].nonzero().flatten().tolist() for first, end in spans] for layer in masked.visible]
    assert shortened.kept == visible


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("settings", VISIPRUNER)
def test_visipruner_equals_that_of_hidden_columns(model: Any, prompt: str, settings: VisiPrunerSettings) -> None:
    token_ids, spans = PROMPTS[prompt]
    masked = VisiPrunerOracle(model).generate(token_ids, pixels(len(spans)), settings, NUM_TOKENS)
    shortened = run(model, token_ids, spans, settings)
    assert shortened.token_ids == masked.token_ids
    assert_close(shortened.logits, masked.logits)
    assert shortened.kept == masked.kept
    assert shortened.margins == pytest.approx(masked.margins, abs=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("settings", MUSTDROP)
def test_mustdrop_equals_that_of_hidden_columns(model: Any, prompt: str, settings: MustDropSettings) -> None:
    token_ids, spans = PROMPTS[prompt]
    masked = MustDropOracle(model).generate(token_ids, pixels(len(spans)), settings, NUM_TOKENS)
    shortened = run(model, token_ids, spans, settings)
    assert shortened.token_ids == masked.token_ids
    assert_close(shortened.logits, masked.logits)
    assert shortened.kept == masked.kept
    assert len({len(tokens) for layer in shortened.kept for tokens in layer}) > 1, "something was dropped"
    for name in ("global", "individual"):
        assert shortened.margins[name] == pytest.approx(masked.margins[name], abs=1e-5)


def test_the_tower_part_of_mustdrop_is_refused(model: Any) -> None:
    for settings in (replace(FILTERS, key_rate=0.1), replace(FILTERS, merge_threshold=0.5)):
        with pytest.raises(ValueError, match="tower"):
            run(model, ONE_IMAGE, [(3, 3 + V)], settings)


def test_a_text_prompt_equals_the_dense_model(model: Any) -> None:
    reference = Reference(model)
    result = reference.run(reference.prepared(TEXT_ONLY, {}), [], FILTERS, 1)
    with torch.no_grad():
        assert_close(result.logits[0], model(input_ids=torch.tensor([TEXT_ONLY])).logits[0, -1])


def test_a_checkpoint_without_a_weight_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.2.mlp.up_proj.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold"):
        load_model(tmp_path, torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        load_model(model, torch.bfloat16)


@pytest.mark.parametrize("spans", [[(3, 3)], [(5, 9), (2, 4)], [(2, 6), (5, 8)], [(-1, 3)], [(4, 10)]])
def test_spans_without_a_meaning_are_refused(spans: list[Span]) -> None:
    check_spans([(0, 3), (3, 4), (6, 9)], 10)
    with pytest.raises(ValueError, match=r"span|end with text"):
        check_spans(spans, 10)
    with pytest.raises(ValueError, match="end with text"):
        check_spans([], 0)
