"""Which rows engines' answers make, where all are equal and where not; no engine runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.families.checkpoints import CHECKPOINTS
from tests.verify.test_comparing import answer
from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.verify.cases import Model, Served, own_model
from vllm_hidrop.verify.checks import GRAPHS, STOCK, Machine, Subject, jobs_of, rows_of
from vllm_hidrop.verify.comparing import Check, Status
from vllm_hidrop.verify.engines import TOO_LATE, Ran
from vllm_hidrop.verify.expected import resolved_choice

NEVER = float("inf")
SERVED = (Served({"method": "hidrop", "options": {"scale": True}}, ("hidrop",)),)
LLAVA = "LlavaForConditionalGeneration"
MODEL = Model("tiny", "/none", LLAVA, ModelShape(2, 4), SERVED, ("3i5",), 3, is_tiny=True)
FACTS = {"graphs": "FULL_DECODE_ONLY", "block_size": 32}
WITH_GPU = Machine("cuda", "bfloat16", with_gpu=True)


def rows(changed: dict[str, Ran] | None = None, model: Model = MODEL) -> dict[str, Check]:
    """The rows of answers that are all equal, but for the engines that are ``changed``."""
    batches = {"off": [answer()], "hidrop": [answer()], "beside": [answer()] * 2}
    names = (STOCK, "hidrop", GRAPHS, f"{STOCK}, {GRAPHS}")
    without = {name: Ran(FACTS, {"off": [answer()], "hidrop": [answer()]}, []) for name in names[2:]}
    ran = {name: Ran(FACTS, batches, []) for name in names[:2]} | without | (changed or {})
    jobs = jobs_of(model, "bfloat16", with_graphs=True)
    assert set(jobs) == set(names)
    return {row.name: row for row in rows_of(Subject(model, "bfloat16", ran, jobs, None), WITH_GPU, NEVER)}


def test_graphs_are_compared_with_eager_steps_and_with_stock_vllms() -> None:
    found = rows()
    for name in ("graphs replay = eager", "off = stock, both with graphs"):
        assert found[name].status is Status.PASSED
    wrong = Ran(FACTS, {"off": [answer((7, 9, 7))], "hidrop": [answer()]}, [])
    found = rows({GRAPHS: wrong})
    assert found["graphs replay = eager"].detail == "prompt 0, token 1: 9, expected 7"
    assert found["off = stock, both with graphs"].status is Status.FAILED


@pytest.mark.parametrize(
    ("ran", "detail"),
    [
        (Ran(FACTS | {"graphs": "NONE"}, {}, []), "the engine switched its graphs off"),
        (Ran({}, {}, [], "ValueError: refused"), "ValueError: refused"),
    ],
)
def test_an_engine_without_its_graphs_fails_the_row(ran: Ran, detail: str) -> None:
    row = rows({GRAPHS: ran})["graphs replay = eager"]
    assert (row.status, row.detail) == (Status.FAILED, detail)


def test_off_prompts_that_ran_in_a_step_of_their_own_prove_nothing() -> None:
    late = replace(answer(), first_step=1)
    batches = {"off": [answer()], "hidrop": [answer()], "beside": [answer(), late]}
    row = rows({"hidrop": Ran(FACTS, batches, [])})["everything kept, by the staged loop = stock"]
    assert (row.status, row.detail) == (Status.FAILED, "off and pruned prompts did not run in one step")


def test_a_method_that_a_users_model_is_refused_did_not_run_and_one_of_the_tiny_models_failed() -> None:
    refused = Ran({}, {}, [], "ValidationError: it needs a vision tower with a class token")
    assert rows({"hidrop": refused})["hidrop = reference"].status is Status.FAILED
    own = replace(MODEL, name="own", is_tiny=False)
    assert rows({"hidrop": refused}, own)["hidrop = reference"].status is Status.NOT_RUN
    assert rows({"hidrop": Ran({}, {}, [], TOO_LATE)}, own)["hidrop = reference"].detail == "time"
    crashed = Ran({"graphs": "NONE"}, {}, [], "ValueError: the measured process ended")
    assert rows({"hidrop": crashed}, own)["hidrop = reference"].status is Status.FAILED


def test_a_reference_that_does_not_fit_is_named() -> None:
    found = rows()
    for name in ("stock = reference, dense", "hidrop = reference"):
        assert (found[name].status, found[name].detail) == (Status.NOT_RUN, "memory: the reference does not fit")


def test_a_users_model_that_takes_no_images_is_refused(tmp_path: Path) -> None:
    CHECKPOINTS["llava_next_video"].make(tmp_path)
    with pytest.raises(ValueError, match="LLaVA-NeXT-Video takes videos alone"):
        own_model(str(tmp_path))


def test_a_users_model_is_served_by_its_own_schedule_first_then_by_every_method() -> None:
    model = own_model("embedded")
    first = model.served[0]
    assert first.choice == {"method": "hidrop", "preset": "embedded"}
    assert resolved_choice(first.choice, "hidrop", model.shape).preset == "embedded"
    asked = [method for served in model.served for method in served.methods]
    assert sorted(asked) == sorted(set(METHODS) - {"none"})
