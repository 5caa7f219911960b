"""What counts as rounding and what as wrong; no engine runs."""

from dataclasses import replace
from typing import Any

from vllm_hidrop.verify.comparing import LEAST_TOLERANCE, compare, first_difference
from vllm_hidrop.verify.engines import Answer
from vllm_hidrop.verify.expected import Expected
from vllm_hidrop.verify.prompts import Prompt

KEPT = [[[0, 1, 2, 3]], [[1, 2]]]
SURE = {7: -0.1, 8: -2.5, 9: -4.0}
EXPECTED = Expected([7, 7, 7], [SURE] * 3, KEPT)


def answer(tokens: tuple[int, ...] = (7, 7, 7), off_by: float = 0.0, kept: list[Any] = KEPT) -> Answer:
    stages = [{"first_layer": n, "end_layer": n + 1, "patches": images} for n, images in enumerate(kept)]
    logprobs = [{token: value + off_by for token, value in SURE.items()} for _ in tokens]
    prompt = Prompt([1, 2, 3, 4, 5, 6], [(1, 5)], [(8, 8)])
    return Answer(list(tokens), logprobs, 0, {"stages": stages, "mode": "pruned"}, prompt)


def problem(found: Answer, dtype: str = "bfloat16", floor: float = 0.05, expected: Expected = EXPECTED) -> str | None:
    return compare([found], [expected], dtype, floor).problem


def test_equal_answers_are_equal_in_every_type() -> None:
    for dtype in LEAST_TOLERANCE:
        assert problem(answer(), dtype, 0.0) is None


def test_another_vision_token_is_wrong_in_float32_and_a_near_tie_in_a_served_type() -> None:
    found = answer(kept=[[[0, 1, 2, 3]], [[1, 3]]])
    assert problem(found, "float32", 0.0) == "prompt 0, layer 1, image 0: [3] kept for [2]"
    assert problem(found) is None


def test_too_many_other_vision_tokens_are_wrong_in_every_type() -> None:
    found = answer(kept=[[[0, 1, 2, 3]], [[0, 3]]])
    assert problem(found) == "only 67% of the kept vision tokens are the reference's"


def test_log_probabilities_may_differ_by_what_stock_vllm_rounds() -> None:
    assert problem(answer(off_by=0.14)) is None
    assert problem(answer(off_by=0.16)) == "prompt 0, token 0 deviates by 0.16, more than 0.15"
    assert problem(answer(off_by=0.002), "float32", 0.0) == "prompt 0, token 0 deviates by 0.002, more than 0.001"


def test_another_token_is_wrong_unless_the_reference_has_a_near_tie() -> None:
    assert problem(answer((7, 8, 8))) == "prompt 0, token 1: 8, expected 7"
    logprobs = [{7: -0.1, 8: -0.2, 9: -4.0}] * 3
    tie, near = replace(EXPECTED, logprobs=logprobs), replace(answer((7, 8, 8)), logprobs=logprobs)
    assert problem(near, expected=tie) is None
    assert problem(near, "float32", 0.0, tie) == "prompt 0, token 1: 8, expected 7"


def test_prompts_with_other_vision_tokens_are_judged_by_their_median() -> None:
    other: list[Any] = [[[0, 1, 2, 3]], [[1, 3]]]
    assert problem(answer(off_by=0.29, kept=other)) is None
    assert problem(answer(off_by=0.4, kept=other)) == "prompt 0, tokens deviate by 0.4 in the median"


def test_float32_that_is_not_exact_is_judged_as_a_served_type() -> None:
    found = answer(kept=[[[0, 1, 2, 3]], [[1, 3]]])
    assert problem(found, "float32", 0.002) is None


def test_the_first_other_token_is_named() -> None:
    assert first_difference([answer()], [answer()]) is None
    assert first_difference([answer(), answer((7, 8, 7))], [answer()] * 2) == "prompt 1, token 1: 8, stock vLLM 7"
