"""Curves against a naive recomputation from what Hugging Face itself gives out under eager attention."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForImageTextToText

from tests.lab.calibrate.tiny_qwen import make_qwen
from vllm_hidrop.embedded import MODEL_DIR
from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint, family_to_calibrate
from vllm_hidrop.lab.calibrate.curves import Curves, Settings, check_settings, measure
from vllm_hidrop.lab.calibrate.recording import recorded, states_without_vision
from vllm_hidrop.lab.calibrate.samples import Sample, read_samples
from vllm_hidrop.verify.tiny_models import make_llava

SETTINGS = Settings(windows=(2, 3), top_tokens=9, max_answer_tokens=4)
MODELS: dict[str, Callable[[Path], Path]] = {
    "embedded": lambda _: MODEL_DIR,
    "llava-mistral": lambda path: make_llava(path, "mistral"),
    "llava-qwen2": lambda path: make_llava(path, "qwen2", "siglip"),
    "qwen2.5-vl": make_qwen,
}


class Case:
    """A model twice: ours to measure, and an eager one to recompute with."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        path = MODELS[name](directory)
        self.ours = Checkpoint(str(path))
        self.eager = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        drawn = list(islice(read_samples("synthetic", None, 3), 4))
        small = [Sample(sample.image.resize((64, 64)), sample.question, sample.answer) for sample in drawn]
        self.samples = drawn if name == "embedded" else small
        self.curves = measure(self.ours, self.samples, SETTINGS)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("model") / "checkpoint")


class Naive:
    """One dense pass: states [layers + 1][N, C] before the final norm, and attentions [layers][H, N, N]."""

    def __init__(self, case: Case, sample: Sample, image: Image.Image, exit_at: int | None = None) -> None:
        encoded = case.ours.encode(image, sample.question, sample.answer, SETTINGS.max_answer_tokens)
        self.inputs, self.prompt = encoded.inputs, encoded.rows.num_prompt
        self.is_vision = self.inputs["input_ids"][0] == case.eager.config.image_token_id
        layers = case.eager.model.language_model.layers
        hooks = [case.eager.model.language_model.norm.register_forward_pre_hook(self._keep_last)]
        if exit_at is not None:
            hooks += [one.register_forward_pre_hook(self._hide, with_kwargs=True) for one in layers[exit_at:]]
        with torch.no_grad():
            output = case.eager(**self.inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.states = [*(state[0] for state in output.hidden_states[:-1]), self.last]
        self.attentions = [attention[0] for attention in output.attentions]
        self.predicted = output.logits[0, self.prompt - 1 : -1].argmax(-1)
        self.answer = self.inputs["input_ids"][0, self.prompt :]

    def _keep_last(self, _: Any, args: tuple[Tensor]) -> None:
        self.last = args[0][0]

    def _hide(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Close the vision columns of a layer's mask; a vision row still sees itself."""
        num_rows = len(self.is_vision)
        open_cells = torch.ones(num_rows, num_rows, dtype=torch.bool).tril() & ~self.is_vision
        open_cells |= torch.eye(num_rows, dtype=torch.bool)
        mask = torch.zeros(1, 1, num_rows, num_rows).masked_fill(~open_cells, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}


def averaged(rows: list[list[float]]) -> Any:
    return pytest.approx(torch.tensor(rows, dtype=torch.float64).mean(0).tolist(), abs=2e-5)


def passes(case: Case) -> list[Naive]:
    return [Naive(case, sample, sample.image) for sample in case.samples]


def test_intra_modal_similarity_is_the_cosine_over_a_layer_by_modality(case: Case) -> None:
    for curve, wants_vision in ((case.curves.vision_intra, True), (case.curves.text_intra, False)):
        rows = []
        for one in passes(case):
            chosen = (one.is_vision == wants_vision)[: one.prompt].nonzero().flatten()
            pairs = zip(one.states, one.states[1:], strict=False)
            rows.append([float(cosine_similarity(a[chosen], b[chosen], dim=-1).mean()) for a, b in pairs])
        assert curve == averaged(rows)


def test_cross_image_similarity_compares_with_the_image_before(case: Case) -> None:
    rows = []
    for before, sample in zip(case.samples, case.samples[1:], strict=False):
        own, other = Naive(case, sample, sample.image), Naive(case, sample, before.image)
        chosen = slice(int(own.is_vision.nonzero()[-1]) + 1, own.prompt)
        pairs = zip(own.states[1:], other.states[1:], strict=True)
        rows.append([float(cosine_similarity(a[chosen], b[chosen], dim=-1).mean()) for a, b in pairs])
    assert case.curves.cross == averaged(rows)


def test_ilvas_is_the_cosine_over_heads_of_the_most_attended_tokens(case: Case) -> None:
    for window, curve in case.curves.ilvas.items():
        rows = []
        for one in passes(case):
            paid = [attention[:, one.prompt - 1][:, one.is_vision] for attention in one.attentions]
            row = []
            for now, later in zip(paid, paid[window:], strict=False):
                top = now.mean(0).argsort(descending=True)[: SETTINGS.top_tokens].tolist()
                row.append(sum(float(cosine_similarity(now[:, i], later[:, i], dim=0)) for i in top) / len(top))
            rows.append(row)
        assert curve == averaged(rows)


def test_the_exit_sweep_equals_masking_the_vision_columns(case: Case) -> None:
    agreement, accuracy = [], []
    for sample in case.samples:
        full = Naive(case, sample, sample.image)
        cut = [Naive(case, sample, sample.image, exit_at) for exit_at in range(case.ours.num_layers)]
        agreement.append([float((one.predicted == full.predicted).float().mean()) for one in cut])
        accuracy.append([float(torch.equal(one.predicted, one.answer)) for one in cut])
    assert case.curves.agreement == averaged(agreement)
    assert case.curves.accuracy == averaged(accuracy)


def test_text_states_without_vision_equal_the_masked_model(case: Case) -> None:
    sample = case.samples[0]
    encoded = case.ours.encode(sample.image, sample.question, sample.answer, SETTINGS.max_answer_tokens)
    with recorded(case.ours.llm.layers, encoded.rows) as recording:
        case.ours.forward(encoded.inputs)
    for first in range(case.ours.num_layers):
        expected = Naive(case, sample, sample.image, first)
        found = states_without_vision(case.ours.llm.layers, recording, first)
        torch.testing.assert_close(found, expected.last[~expected.is_vision], atol=1e-4, rtol=1e-4)
    assert not any(layer._forward_hooks for layer in case.ours.llm.layers)


def test_without_answers_agreement_is_with_the_greedy_answer(case: Case) -> None:
    samples = [Sample(sample.image, sample.question, None) for sample in case.samples[:2]]
    curves = measure(case.ours, samples, SETTINGS)
    assert curves.accuracy is None
    assert curves.full_accuracy is None
    assert len(curves.agreement) == case.ours.num_layers
    encoded = case.ours.encode(samples[0].image, samples[0].question, None, 4)
    with recorded(case.ours.llm.layers, encoded.rows) as recording:
        case.ours.forward(encoded.inputs)
    predicted = case.ours.predict(recording.last_states[-encoded.rows.num_answer - 1 : -1])
    # A random model may want to write the image token, which an answer must not hold.
    is_image = predicted == case.ours.config.image_token_id
    assert torch.equal(predicted[~is_image], encoded.answer[~is_image])
    assert encoded.rows.num_answer


def test_images_of_other_sizes_are_fitted_or_counted(case: Case) -> None:
    resized = [Sample(case.samples[1].image.resize((96, 64)), case.samples[1].question, "t5")]
    curves: Curves = measure(case.ours, [case.samples[0], *resized], SETTINGS)
    least, _, most = curves.vision_tokens
    assert (least < most) == (case.name == "qwen2.5-vl")


def test_the_same_image_throughout_is_refused() -> None:
    checkpoint = Checkpoint(str(MODEL_DIR))
    sample = next(read_samples("synthetic", None, 0))
    with pytest.raises(ValueError, match="every sample shows the same image"):
        measure(checkpoint, [sample, sample], SETTINGS)


def test_windows_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"a window must be in \[1, 5\] for 6 layers, got 6"):
        check_settings(Settings(windows=(2, 6)), 6)


def test_unknown_models_and_devices_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model directory"):
        Checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot load model"):
        Checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="cannot use device 'abacus'"):
        Checkpoint(str(MODEL_DIR), "abacus")


def test_a_family_that_cannot_be_calibrated_is_named() -> None:
    def refused(architecture: str, **parts: str) -> str:
        part = SimpleNamespace(**parts)
        config: Any = SimpleNamespace(architectures=[architecture], vision_config=part, get_text_config=lambda: part)
        with pytest.raises(ValueError, match=r"cannot|can run") as caught:
            family_to_calibrate(config)
        return str(caught.value)

    assert "BertModel is not a family that can run staged; supported: LLaVA-1.5" in refused("BertModel")
    assert "attend both ways" in refused("Gemma3ForConditionalGeneration")
    assert refused("InternVLChatModel").startswith("cannot calibrate InternVL2.5 / 3 / 3.5: the released form's")
    assert "LLaVA-NeXT-Video: it takes videos alone" in refused("LlavaNextVideoForConditionalGeneration")
    assert "vision tower 'resnet' cannot run" in refused("LlavaForConditionalGeneration", model_type="resnet")
