"""Answers against stock vLLM's, token for token, and against a reference's, within what rounding explains.

Deviation of a generated token: the mean of |log p - log p of the reference| over the engine's likeliest tokens. In
float32 tokens and kept vision tokens are equal or wrong. In a served type, and where a machine's float32 is not exact
(stock vLLM deviates by more than ``LEAST_TOLERANCE``), rounding may decide a near tie: which vision
tokens stay, then which token is next; prompts that kept the reference's vision tokens are judged strictly, the others
by the median of their tokens and by how many vision tokens they share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import mean, median

from vllm_hidrop.verify.engines import Answer
from vllm_hidrop.verify.expected import Expected, Logprobs

NOISE_FACTOR = 3  # deviations up to so many times those of stock vLLM from the dense reference are rounding
LEAST_SHARED = 0.8  # of the kept vision tokens, where rounding decides near ties
LEAST_TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}
MOST_NOISE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.4}  # of stock vLLM: more is no rounding


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Check:
    """One row of the page: what was checked on which ``subject``, how it ended, what was seen or why it did not run."""

    subject: str
    name: str
    status: Status
    detail: str


def passed_or(problem: str | None, subject: str, name: str, seen: str) -> Check:
    """A check that failed with ``problem``, or passed with what was ``seen``."""
    return Check(subject, name, Status.FAILED if problem else Status.PASSED, problem or seen)


def first_difference(ours: Sequence[Answer], stock: Sequence[Answer]) -> str | None:
    """Where two lists of answers give other tokens first; None: nowhere."""
    for prompt, (one, other) in enumerate(zip(ours, stock, strict=True)):
        if one.token_ids != other.token_ids:
            pairs = zip(one.token_ids, other.token_ids, strict=True)
            place = next(n for n, (a, b) in enumerate(pairs) if a != b)
            return f"prompt {prompt}, token {place}: {one.token_ids[place]}, stock vLLM {other.token_ids[place]}"
    return None


def as_expected(answer: Answer) -> Expected:
    """Another engine's answer in the place of a reference's."""
    return Expected(answer.token_ids, answer.logprobs, [images for _, images in _layers(answer)])


def deviations(answer: Answer, expected: Expected) -> list[float]:
    """The deviation of every generated token up to the first that the reference would not have chosen, inclusive."""
    found = []
    for place, likeliest in enumerate(answer.logprobs):
        reference = expected.logprobs[place]
        found.append(mean(abs(value - _of_token(reference, token)) for token, value in likeliest.items()))
        if answer.token_ids[place] != expected.token_ids[place]:
            break
    return found


def _of_token(logprobs: Logprobs, token: int) -> float:
    """A token's log-probability; the least known one where another engine does not name the token."""
    if isinstance(logprobs, dict):
        return logprobs.get(token, min(logprobs.values()))
    return float(logprobs[token])


def noise(answers: Sequence[Answer], expected: Sequence[Expected]) -> float:
    """The largest deviation of dense answers."""
    return max(max(deviations(*pair)) for pair in zip(answers, expected, strict=True))


def _layers(answer: Answer) -> Iterator[tuple[int, list[list[int]]]]:
    """Per layer the vision tokens that ran, by image; nothing for a request without ``hidrop_explain``."""
    for stage in (answer.report or {}).get("stages", ()):
        for layer in range(stage["first_layer"], stage["end_layer"]):
            yield layer, stage.get("patches", [])


def other_selection(answer: Answer, expected: Expected) -> str | None:
    """The first layer and image whose vision tokens are not the reference's; None: all are."""
    for layer, images in _layers(answer):
        for image, (found, wanted) in enumerate(zip(images, expected.kept[layer], strict=True)):
            if found != wanted:
                missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
                return f"layer {layer}, image {image}: {extra[:8]} kept for {missing[:8]}"
    return None


def shared(answers: Sequence[Answer], expected: Sequence[Expected]) -> float:
    """Share of the reference's kept vision tokens, over all layers, that the engine kept too; 1 without images."""
    common = total = 0
    for answer, wanted in zip(answers, expected, strict=True):
        for layer, images in _layers(answer):
            for found, of_image in zip(images, wanted.kept[layer], strict=True):
                common += len(set(found) & set(of_image))
                total += max(len(found), len(of_image))
    return common / total if total else 1.0


@dataclass(frozen=True)
class Comparison:
    """Answers beside a reference's; ``problem`` names the first thing that rounding does not explain."""

    problem: str | None
    tolerance: float
    worst: float  # deviation of a token of the prompts that are judged strictly
    middle: float  # of the others, the largest median
    num_equal: int  # prompts that kept the reference's vision tokens
    num_prompts: int
    share: float  # of the kept vision tokens

    def __str__(self) -> str:
        same = f"same vision tokens in {self.num_equal} of {self.num_prompts} prompts"
        if self.num_equal < self.num_prompts:
            same += f" ({self.share:.1%} of all tokens; others' log p within {self.middle:.1g} in the median)"
        return f"{same}; {self.logprobs if self.num_equal else f'tolerance {self.tolerance:.1g}'}"

    @property
    def logprobs(self) -> str:
        """How near the log-probabilities came."""
        return f"log p within {self.worst:.1g}, tolerance {self.tolerance:.1g}"


def is_exact(dtype: str, floor: float) -> bool:
    """Whether rounding explains no other token and no other vision token."""
    return dtype == "float32" and floor <= LEAST_TOLERANCE[dtype]


def compare(answers: Sequence[Answer], expected: Sequence[Expected], dtype: str, floor: float) -> Comparison:
    """Judge answers; ``floor`` is :func:`noise` of stock vLLM in this ``dtype``."""
    tolerance = max(LEAST_TOLERANCE[dtype], NOISE_FACTOR * floor)
    exact = is_exact(dtype, floor)
    num_equal, worst, largest_median = 0, 0.0, 0.0
    problems: list[str] = []
    for prompt, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        other, found = other_selection(answer, wanted), deviations(answer, wanted)
        num_equal += other is None
        if other is None or exact:
            worst = max(worst, *found)
            wrong = other or _wrong_token(answer, wanted, 0.0 if exact else 2 * tolerance)
            if not wrong and max(found) > tolerance:
                wrong = f"token {found.index(max(found))} deviates by {max(found):.2g}, more than {tolerance:.2g}"
        else:
            middle = median(found)
            largest_median = max(largest_median, middle)
            wrong = f"tokens deviate by {middle:.2g} in the median" if middle > 2 * tolerance else None
        problems += [f"prompt {prompt}, {wrong}"] if wrong else []
    share = shared(answers, expected)
    if share < LEAST_SHARED:
        problems.append(f"only {share:.0%} of the kept vision tokens are the reference's")
    return Comparison(next(iter(problems), None), tolerance, worst, largest_median, num_equal, len(answers), share)


def _wrong_token(answer: Answer, expected: Expected, tolerance: float) -> str | None:
    """The first token that the reference would not have chosen, unless its two candidates are a near tie."""
    for place, (token, wanted) in enumerate(zip(answer.token_ids, expected.token_ids, strict=True)):
        if token != wanted:
            logprobs = expected.logprobs[place]
            gap = _of_token(logprobs, wanted) - _of_token(logprobs, token)
            return f"token {place}: {token}, expected {wanted}" if gap > tolerance else None
    return None
