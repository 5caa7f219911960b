"""Settings of vLLM that pruning works with: the same answers as without them, or stock vLLM's; see ``gate.CHECKED``."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import LogitsProcessor

from tests.engine.harness import Ask, Engine, engine, prompt
from tests.engine.test_oracle_parity import pixel_values
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, VOCABULARY, make_llava

pytestmark = pytest.mark.engine

HIDROP = {
    "method": "hidrop",
    "options": {
        "shape": [NUM_LAYERS, TOKENS_PER_IMAGE],
        "inject_layer": 1,
        "filter_layers": [2, 4],
        "keeps": [20, 5],
        "exit_layer": 7,
    },
}
MUSTDROP = {
    "method": "mustdrop",
    "preset": "tok64",
    "options": {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE], "merge_window": 2, "filter_layers": [1, 3, 5]},
}
LAYOUTS = {"3i5": 1, "9": 0, "2ii3": 2, "99": 0, "5i2i6": 2}
OFF = {"hidrop": "off"}


def asks() -> list[Ask]:
    """Pruned and text requests, every second one ``off``."""
    rng = np.random.default_rng(8)
    found = []
    for number, (layout, images) in enumerate(LAYOUTS.items()):
        tokens, seeds = prompt(rng, layout), tuple(range(10 * number, 10 * number + images))
        found += [Ask(tokens, seeds), Ask(tokens, seeds, OFF)]
    return found


def tokens_of(running: Engine, asked: list[Ask]) -> list[list[int]]:
    return [answer.token_ids for answer in running.ask(asked)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@cache
def expected(model: Path) -> list[list[int]]:
    with engine(model, HIDROP) as running:
        return tokens_of(running, asks())


ADMISSION = {
    "watermark": 0.1,
    "scheduler_reserve_full_isl": False,
    "num_gpu_blocks_override": 200,
    "max_num_active_seqs": 2,
    "disable_chunked_mm_input": True,
}
WHOLE = {
    "enable_chunked_prefill": False,
    "max_num_scheduled_tokens": 512,
    "mm_processor_cache_gb": 0,
    "skip_mm_profiling": True,
}


TEXT_ALONE: list[dict[str, Any]] = [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0}}]


@pytest.mark.parametrize("settings", [ADMISSION, WHOLE], ids=" ".join)
def test_settings_that_leave_every_answer_as_it_is(model: Path, settings: dict[str, Any]) -> None:
    with engine(model, HIDROP, **settings) as running:
        assert tokens_of(running, asks()) == expected(model)


@pytest.mark.parametrize("settings", TEXT_ALONE, ids=" ".join)
@pytest.mark.parametrize("hidrop", [HIDROP, MUSTDROP], ids=lambda hidrop: str(hidrop["method"]))
def test_a_server_of_text_alone_has_no_tower(model: Path, hidrop: dict[str, Any], settings: dict[str, Any]) -> None:
    every = zip(asks(), expected(model), strict=True)
    compared = [(ask, tokens) for ask, tokens in every if not ask.images]
    with engine(model, hidrop, **settings) as running:
        assert tokens_of(running, [ask for ask, _ in compared]) == [tokens for _, tokens in compared]


def test_priority_says_who_is_preempted_and_changes_no_answer(model: Path) -> None:
    asked = [Ask(ask.tokens, ask.images, ask.options, max_tokens=90) for ask in asks()[:2]]
    victims = []
    with engine(model, HIDROP, scheduling_policy="priority", max_model_len=256, num_gpu_blocks_override=34) as running:
        alone = [tokens_of(running, [ask])[0] for ask in asked]
        preempt = running.scheduler._preempt_request

        def seen(request: Any, *args: Any, **kwargs: Any) -> None:
            victims.append(request.priority)
            preempt(request, *args, **kwargs)

        running.scheduler._preempt_request = seen
        together = running.llm.generate(
            [running.prompt(ask) for ask in asked],
            [running.params(ask) for ask in asked],
            priority=[9, 0],
            use_tqdm=False,
        )
    assert set(victims) == {9}
    assert [list(output.outputs[0].token_ids) for output in together] == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_models_own_dtype_named_for_the_cache_changes_no_answer(model: Path, dtype: str) -> None:
    """One request at a time: a rounding model's near ties fall by what else is in the batch."""
    answers = []
    for choice, named in ((None, "auto"), (HIDROP, "auto"), (HIDROP, dtype)):
        with engine(model, choice, dtype=dtype, kv_cache_dtype=named) as running:
            answers.append([tokens_of(running, [ask])[0] for ask in asks()])
    stock, ours, ours_named = answers
    assert ours_named == ours
    assert ours_named[1::2] == stock[1::2]


def test_a_stream_interval_loses_no_token_and_no_report(model: Path) -> None:
    ask, tokens = asks()[0], expected(model)[0]
    params = SamplingParams(
        temperature=0, max_tokens=ask.max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    with engine(model, HIDROP, stream_interval=4) as running:
        running.llm.llm_engine.add_request("one", running.prompt(ask), params)
        outputs = []
        while running.llm.llm_engine.has_unfinished_requests():
            outputs += running.step()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 4, 1]
    assert [token for output in outputs for token in output.outputs[0].token_ids] == tokens
    reports = [(output.kv_transfer_params or {}).get("hidrop") for output in outputs]
    assert [report and report["mode"] for report in reports[::2]] == ["pruned", "pruned"]


class OnlyLow(LogitsProcessor):
    """Forbids the upper half of the vocabulary to requests that say so."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.forbidding: dict[int, bool] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.forbidding.pop(index, None)
        for index, params, _, _ in batch_update.added:
            self.forbidding[index] = bool((params.extra_args or {}).get("low"))
        for source, target, _ in batch_update.moved:
            self.forbidding[source], self.forbidding[target] = (
                self.forbidding.get(target, False),
                self.forbidding.get(source, False),
            )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = [index for index, forbids in self.forbidding.items() if forbids]
        logits[rows, VOCABULARY // 2 :] = -torch.inf
        return logits


def test_a_logits_processor_sees_the_rows_of_pruned_requests(model: Path) -> None:
    low = [Ask(ask.tokens, ask.images, ask.options | {"low": i % 4 == 0}) for i, ask in enumerate(asks())]
    with engine(model, HIDROP, logits_processors=[OnlyLow]) as running:
        together = tokens_of(running, low)
        alone = [tokens_of(running, [ask])[0] for ask in low]
    assert together == alone
    for tokens, unforced, ask in zip(together, expected(model), low, strict=True):
        if ask.options["low"]:
            assert max(tokens) < VOCABULARY // 2 <= max(unforced)
        else:
            assert tokens == unforced


def test_image_embeddings_are_pruned_as_their_image_is(model: Path) -> None:
    ask, tokens = asks()[4], expected(model)[4]
    with engine(model, HIDROP, enable_mm_embeds=True) as running:
        llava = running.runner.model
        with torch.inference_mode():
            features = llava._image_pixels_to_features(llava.vision_tower, pixel_values(ask))
            embeddings = llava.multi_modal_projector(features)
        given = {"prompt_token_ids": list(ask.tokens), "multi_modal_data": {"image": embeddings}}
        (output,) = running.llm.generate([given], [running.params(ask)], use_tqdm=False)
    assert list(output.outputs[0].token_ids) == tokens
    assert output.kv_transfer_params["hidrop"]["mode"] == "pruned"
