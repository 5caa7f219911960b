"""What a request may ask of vLLM means the same on a pruning server: sampling, stopping, penalties, structure.

``off`` and text-only requests equal stock vLLM; pruned requests under load equal themselves alone, and what they
ask for is recomputed here from their raw logits.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.characters import save_character_tokenizer, token_of
from tests.engine.harness import Ask, Engine, engine, prompt
from vllm_hidrop.verify.tiny_models import EOS_TOKEN, IMAGE_TOKEN, TOKENS_PER_IMAGE, make_llava

pytestmark = [
    pytest.mark.engine,
    # vLLM's way to call xgrammar; its compiling thread would take the warning for a bad grammar.
    pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated:DeprecationWarning"),
]

HIDROP = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}
VOWELS = list("aeiouAEIOU")
STOP_TOKENS = list(range(10, 40))
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
    "required": ["ok", "colour"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_tokens": 1},
    "seed": {"temperature": 0.9, "seed": 3},
    "top_p": {"temperature": 1.2, "top_p": 0.7, "seed": 4},
    "top_k and min_p": {"temperature": 1.0, "top_k": 9, "min_p": 0.01, "seed": 5},
    "n": {"temperature": 1.0, "n": 3, "seed": 11},
    "stop": {"stop": VOWELS},
    "stop kept": {"stop": VOWELS, "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": STOP_TOKENS},
    "min_tokens": {"stop_token_ids": STOP_TOKENS, "min_tokens": 12},
    "eos": {"logit_bias": {EOS_TOKEN: 100.0}, "ignore_eos": False},
    "eos after min_tokens": {"logit_bias": {EOS_TOKEN: 100.0}, "ignore_eos": False, "min_tokens": 5},
    "ignore_eos": {"logit_bias": {EOS_TOKEN: 100.0}},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.2},
    "logit_bias": {"logit_bias": {token_of("a"): 6.0, token_of("b"): -100.0}},
    "bad_words": {"bad_words": VOWELS},
    "allowed_token_ids": {"allowed_token_ids": [token_of(c) for c in "0123456789"]},
    "regex": {"structured_outputs": StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2}"), "ignore_eos": False},
    "choice": {"structured_outputs": StructuredOutputsParams(choice=["red", "green"]), "ignore_eos": False},
    "json": {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "max_tokens": 60, "ignore_eos": False},
}
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:  # where the kernel of grammars' bitmasks does not run, and others are slow
    CASES = {name: case for name, case in CASES.items() if "structured_outputs" not in case}
LAYOUTS = {"pruned": ["3i5", "2i3i4"], "off": ["3i5", "2i3i4"], "text": ["9", "99"]}
if IS_INTERPRETED:
    LAYOUTS = {kind: layouts[1:] for kind, layouts in LAYOUTS.items()}
NUMBERS = range(len(LAYOUTS["pruned"]))
PLACES = [(kind, i) for kind, layouts in LAYOUTS.items() for i in range(len(layouts))]


@dataclass(frozen=True)
class Choice:
    """One choice of an answer."""

    token_ids: list[int]
    text: str
    ended: tuple[str, Any]
    logits: torch.Tensor
    """[generated, vocabulary], before any processing."""


Results = dict[tuple[str, str, int], list[Choice]]
"""(case, kind of prompt, its number) -> choices."""


def ask_of(kind: str, number: int) -> Ask:
    layout = LAYOUTS[kind][number]
    options = {"hidrop": "off"} if kind == "off" else {}
    return Ask(prompt(np.random.default_rng(number), layout), tuple(range(layout.count("i"))), options)


def params_of(case: str, kind: str, **more: Any) -> SamplingParams:
    asked = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "logprobs": -1} | CASES[case] | more
    return SamplingParams(**asked, extra_args=dict(ask_of(kind, 0).options))


def run(running: Engine, keys: Sequence[tuple[str, str, int]], **more: Any) -> Results:
    """All of these together."""
    prompts = [running.prompt(ask_of(kind, number)) for _, kind, number in keys]
    outputs = running.llm.generate(prompts, [params_of(case, kind, **more) for case, kind, _ in keys], use_tqdm=False)
    return {key: [choice_of(each) for each in output.outputs] for key, output in zip(keys, outputs, strict=True)}


def choice_of(completion: Any) -> Choice:
    steps = completion.logprobs or []
    logits = torch.tensor([[step[token].logprob for token in range(len(step))] for step in steps])
    ended = str(completion.finish_reason), completion.stop_reason
    return Choice(list(completion.token_ids), completion.text, ended, logits)


KEYS = [(case, kind, number) for case in CASES for kind, number in PLACES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_tokenizer(make_llava(tmp_path_factory.mktemp("llava"), "mistral"))


@pytest.fixture(scope="module")
def stock(model: Path) -> Results:
    # All prompts in one step: stock vLLM on CPU ends with an error when a seeded prompt is split.
    with engine(model, None, max_num_batched_tokens=1 << 14) as running:
        return run(running, [key for key in KEYS if key[1] != "pruned"])


@dataclass(frozen=True)
class Pruning:
    """What the pruning server answered."""

    together: Results
    alone: Results
    seeded: list[Choice]
    """The first pruned prompt with the seeds that "n" gives its choices."""


@pytest.fixture(scope="module")
def pruning(model: Path) -> Pruning:
    with engine(model, HIDROP) as running:
        together = run(running, KEYS)
        alone: Results = {}
        for key in KEYS:
            if key[1] == "pruned":
                alone |= run(running, [key])
        key = ("seed", "pruned", 0)
        seeded = [run(running, [key], temperature=1.0, seed=11 + i)[key][0] for i in range(3)]
    return Pruning(together, alone, seeded)


def check_same(found: list[Choice], expected: list[Choice]) -> None:
    assert [(c.token_ids, c.text, c.ended) for c in found] == [(c.token_ids, c.text, c.ended) for c in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_off_and_text_equal_stock_beside_pruned_requests(stock: Results, pruning: Pruning, case: str) -> None:
    for kind, number in PLACES:
        if kind != "pruned":
            check_same(pruning.together[case, kind, number], stock[case, kind, number])


@pytest.mark.parametrize("case", CASES)
def test_pruned_under_load_equals_pruned_alone(pruning: Pruning, case: str) -> None:
    for number in NUMBERS:
        check_same(pruning.together[case, "pruned", number], pruning.alone[case, "pruned", number])


def test_pruned_answers_are_others_than_dense_ones(pruning: Pruning) -> None:
    """Else all of the above could hold on a server that prunes nothing."""
    together = pruning.together
    pairs = [(together[case, "pruned", 0][0], together[case, "off", 0][0]) for case in CASES]
    differ = [pruned for pruned, off in pairs if pruned.token_ids != off.token_ids]
    assert len(differ) > len(CASES) / 2


def test_every_choice_of_n_has_the_seed_vllm_gives_it(pruning: Pruning) -> None:
    choices = pruning.together["n", "pruned", 0]
    assert [choice.token_ids for choice in choices] == [choice.token_ids for choice in pruning.seeded]
    assert choices[0].token_ids != choices[1].token_ids


@pytest.mark.parametrize("number", NUMBERS)
def test_stops_cut_what_greedy_yields(pruning: Pruning, number: int) -> None:
    def of(case: str) -> Choice:
        return pruning.together[case, "pruned", number][0]

    greedy = of("greedy")
    end = min(greedy.text.index(vowel) for vowel in VOWELS if vowel in greedy.text)
    assert of("stop").text == greedy.text[:end]
    assert of("stop kept").text == greedy.text[: end + 1]
    assert of("stop").ended == ("stop", greedy.text[end])
    stop = next(i for i, token in enumerate(greedy.token_ids) if token in STOP_TOKENS)
    assert of("stop_token_ids").token_ids == greedy.token_ids[: stop + 1]
    assert of("stop_token_ids").ended == ("stop", greedy.token_ids[stop])
    late = of("min_tokens").token_ids
    assert not set(late[:12]) & set(STOP_TOKENS)
    assert len(late) == 24 or late[-1] in STOP_TOKENS
    assert of("one token").token_ids == greedy.token_ids[:1]
    assert of("one token").ended == ("length", None)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_end_token_ends_unless_it_may_not(pruning: Pruning, number: int) -> None:
    def of(case: str) -> Choice:
        return pruning.together[case, "pruned", number][0]

    assert (of("eos").token_ids, of("eos").ended) == ([EOS_TOKEN], ("stop", None))
    *before, last = of("eos after min_tokens").token_ids
    assert (len(before), last, EOS_TOKEN in before) == (5, EOS_TOKEN, False)
    assert of("ignore_eos").token_ids == [EOS_TOKEN] * 24


def processed(case: str, logits: torch.Tensor, prompt_ids: list[int], generated: list[int]) -> torch.Tensor:
    """The logits [vocabulary] of one step after what the case asks for, by the formulas vLLM documents."""
    asked, logits = CASES[case], logits.clone()
    for token, bias in asked.get("logit_bias", {}).items():
        logits[token] += bias
    if "repetition_penalty" in asked:
        seen = list({*prompt_ids, *generated})
        penalty = asked["repetition_penalty"]
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    for token in set(generated):
        logits[token] -= asked.get("presence_penalty", 0) + asked.get("frequency_penalty", 0) * generated.count(token)
    for token in map(token_of, asked.get("bad_words", [])):
        logits[token] = -torch.inf
    if "allowed_token_ids" in asked:
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[asked["allowed_token_ids"]] = True
        logits[~allowed] = -torch.inf
    return logits


@pytest.mark.parametrize(
    "case",
    [
        "greedy",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
    ],
)
@pytest.mark.parametrize("number", NUMBERS)
def test_processing_of_pruned_requests_is_what_is_asked(pruning: Pruning, case: str, number: int) -> None:
    """A penalty on the prompt's tokens counts the whole prompt, with its image tokens: they are in no row, but sent."""
    choice = pruning.together[case, "pruned", number][0]
    tokens = ask_of("pruned", number).tokens
    prompt_ids = [t for token in tokens for t in [token] * (TOKENS_PER_IMAGE if token == IMAGE_TOKEN else 1)]
    expected = [
        int(processed(case, logits, prompt_ids, choice.token_ids[:i]).argmax())
        for i, logits in enumerate(choice.logits)
    ]
    assert choice.token_ids == expected
    assert len(expected) == 24
    plain = pruning.together["greedy", "pruned", number][0].token_ids
    assert case == "greedy" or choice.token_ids != plain, "nothing was processed"


@pytest.mark.parametrize("number", NUMBERS)
def test_pruned_requests_follow_a_grammar(pruning: Pruning, number: int) -> None:
    def of(case: str) -> str:
        choice = pruning.together[case, "pruned", number][0]
        assert choice.ended == ("stop", None), choice
        return choice.text

    assert re.fullmatch("[0-9]{3}-[a-f]{2}", of("regex"))
    assert of("choice") in ("red", "green")
    found = json.loads(of("json"))
    assert found.keys() == {"ok", "colour"}
    assert isinstance(found["ok"], bool)
    assert found["colour"] in ("red", "blue")


def test_prompt_logprobs_are_stocks_for_off_and_text_and_refused_for_pruned(model: Path) -> None:
    keys = [("greedy", kind, 0) for kind in LAYOUTS]

    def ask(running: Engine) -> list[Any]:
        prompts = [running.prompt(ask_of(kind, number)) for _, kind, number in keys]
        params = [params_of(case, kind, prompt_logprobs=2, max_tokens=3) for case, kind, _ in keys]
        return running.llm.generate(prompts, params, use_tqdm=False)

    with engine(model, None) as running:
        expected = ask(running)
    with engine(model, HIDROP) as running:
        found = ask(running)
    assert found[0].outputs[0].finish_reason == "error"
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs) == len(one.prompt_token_ids)
        for mine, stocks in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert {t: p.rank for t, p in mine.items()} == {t: p.rank for t, p in stocks.items()}
            assert [p.logprob for p in mine.values()] == pytest.approx([p.logprob for p in stocks.values()], abs=1e-4)


def test_a_seeded_prompt_in_chunks_draws_as_it_does_in_one_piece(model: Path) -> None:
    """Stock vLLM on CPU ends with "CPU Generator does not use offset" here."""
    keys = [("seed", "off", 1), ("seed", "text", 1), ("greedy", "text", 0)]
    with engine(model, HIDROP) as running:
        expected = run(running, keys)
    with engine(model, HIDROP, max_model_len=200, max_num_batched_tokens=200) as running:
        # Two prompts of 138 tokens and steps of 200: the second is split.
        found = run(running, [keys[0], *keys])
    for key in keys:
        check_same(found[key], expected[key])
