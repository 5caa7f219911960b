"""Fields that hold numbers, names or lists of them: how long, and of one type throughout.

A list of a wrong type costs vLLM's models an error for each element. Knows field names; not what they do.
"""

from collections.abc import Mapping
from typing import Any

from hidrop_server.errors import BodyRefused

MAX_NAME_CHARS = 1024
MAX_ID_CHARS = 256
MAX_LIST = 1024
MAX_PROMPTS = 8192

NAMES = (
    "cache_salt",
    "model",
    "previous_response_id",
    "prompt_cache_key",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "tool_choice",
    "truncation",
    "truncation_side",
    "user",
)
IDS = ("request_id", "session_id")
NUMBERS = (
    "best_of",
    "frequency_penalty",
    "length_penalty",
    "logprobs",
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens",
    "max_tool_calls",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "priority",
    "prompt_logprobs",
    "repetition_penalty",
    "seed",
    "temperature",
    "thinking_token_budget",
    "top_k",
    "top_logprobs",
    "top_p",
    "truncate_prompt_tokens",
)
"""Pydantic takes true for 1. Chat's ``logprobs`` is a boolean, completions' a number: both may come."""
BOOLEAN_TOO = ("logprobs",)
STRINGS = {"bad_words": MAX_LIST, "include": 64, "stop": MAX_LIST, "stop_sequences": MAX_LIST}
INTEGERS = {
    "allowed_token_ids": None,
    "label_token_ids": MAX_LIST,
    "logprob_token_ids": MAX_LIST,
    "stop_token_ids": MAX_LIST,
    "tokens": None,
}
"""At most so many; None: as many as a body may have values."""
OBJECTS = {"logit_bias": MAX_LIST, "metadata": 64, "media_io_kwargs": 64, "vllm_xargs": 64, "questions": MAX_LIST}
INSIDE = (("prompt", "variables"), ("response_format", "structures"), ("response_format", "triggers"))
MAX_INSIDE = 256
PROMPTS = ("prompt", "items", "query", "queries")


def check_scalars(body: Mapping[str, Any]) -> None:
    """Check these fields of a body.

    Raises:
        BodyRefused: names the field and its limit.
    """
    for name in NUMBERS:
        if isinstance(body.get(name), bool) and name not in BOOLEAN_TOO:
            raise BodyRefused(f"{name}: must be a number, not true or false")
    for names, most in ((NAMES, MAX_NAME_CHARS), (IDS, MAX_ID_CHARS)):
        for name in names:
            _check_length(body.get(name), name, most)
    for name, most in OBJECTS.items():
        value = body.get(name)
        if isinstance(value, dict) and len(value) > most:
            raise BodyRefused(f"{name}: at most {most} entries")
    _check_lists(body)
    for name in PROMPTS:
        _check_prompts(body.get(name), name)
    for index, document in enumerate(_list_of(body.get("documents"), "documents", MAX_LIST)):
        if isinstance(document, dict) and not set(map(type, document.values())) <= {str, list}:
            raise BodyRefused(f"documents.{index}: must be an object of texts")
    for name, inner in INSIDE:
        value = body.get(name)
        several = value.get(inner) if isinstance(value, dict) else None
        if isinstance(several, dict | list) and len(several) > MAX_INSIDE:
            raise BodyRefused(f"{name}.{inner}: at most {MAX_INSIDE} elements")


def _check_lists(body: Mapping[str, Any]) -> None:
    for name, most in STRINGS.items():
        _check_length(body.get(name), name, MAX_NAME_CHARS)
        for index, each in enumerate(_list_of(body.get(name), name, most)):
            if not isinstance(each, str):
                raise BodyRefused(f"{name}.{index}: must be a string")
            _check_length(each, f"{name}.{index}", MAX_NAME_CHARS)
    for name, at_most in INTEGERS.items():
        values = _list_of(body.get(name), name, at_most)
        if not set(map(type, values)) <= {int}:
            raise BodyRefused(f"{name}: must be a list of whole numbers")


def _check_prompts(value: Any, name: str) -> None:
    """A text, tokens, or a list of either kind."""
    prompts = _list_of(value, name, None)
    kinds = set(map(type, prompts))
    if kinds <= {int}:
        return
    if len(kinds) > 1 or not kinds <= {str, list, dict}:
        raise BodyRefused(f"{name}: must be a text, a list of texts, a list of tokens or a list of lists of tokens")
    if len(prompts) > MAX_PROMPTS:
        raise BodyRefused(f"{name}: at most {MAX_PROMPTS} prompts")
    for index, each in enumerate(prompts):
        if isinstance(each, list) and not set(map(type, each)) <= {int}:
            raise BodyRefused(f"{name}.{index}: must be a list of whole numbers")


def _list_of(value: Any, name: str, most: int | None) -> list[Any]:
    """The list; none if it is something else, which vLLM's models refuse with one error."""
    if not isinstance(value, list):
        return []
    if most is not None and len(value) > most:
        raise BodyRefused(f"{name}: at most {most} elements")
    return value


def _check_length(value: Any, name: str, most: int) -> None:
    if isinstance(value, str) and len(value) > most:
        raise BodyRefused(f"{name}: longer than {most} characters")
