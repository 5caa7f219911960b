"""The step budget: rows that a step computes, mean over the layers, instead of prompt tokens.

``--max-num-batched-tokens`` bounds what one step computes. A pruned prompt computes fewer rows than it has tokens, so
more prompts share a step; vLLM's own limit, which sizes its buffers, is raised to :func:`most_tokens`.
"""

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Schedule

MOST_TOKENS_PER_ROW = 4
"""Bounds vLLM's input buffers and, where pruned prompts keep every token in some layer, a step's peak memory."""


def most_tokens(num_rows: int, schedule: Schedule, num_image_tokens: int) -> int:
    """Image tokens that a schedule prunes to ``num_rows`` rows, at most :data:`MOST_TOKENS_PER_ROW` for each."""
    rows_per_image = schedule.mean_kept(num_image_tokens)
    return int(num_rows * min(MOST_TOKENS_PER_ROW, num_image_tokens / max(rows_per_image, 1)))


class StepBudget:
    """Rows left in the step that is being scheduled, of ``num_rows``, mean over the layers of a ``schedule``."""

    def __init__(self, num_rows: int, schedule: Schedule) -> None:
        self.num_rows = num_rows
        self.schedule = schedule
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.left: float = self.num_rows
        self.num_prefills = 0
        self.spent: dict[str, float] = {}

    def fit(self, plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many of a request's ``num_new_tokens`` fit into the step.

        The pruned part of a prompt fits as a whole or not at all; where it alone exceeds a step's rows, it fits into a
        step without other prefills.
        """
        rows = self._rows(plan, num_computed_tokens, num_new_tokens)
        is_whole = _ends_prompt(plan, num_computed_tokens, num_new_tokens)
        is_too_large = is_whole and rows > self.num_rows
        if rows <= self.left or (is_too_large and not self.num_prefills):
            return num_new_tokens
        return max(0, min(num_new_tokens - is_whole, int(self.left)))

    def spend(self, request_id: str, plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> None:
        """Take the rows of a request's ``num_new_tokens`` from the step."""
        rows = self._rows(plan, num_computed_tokens, num_new_tokens)
        self.spent[request_id] = rows
        self.left -= rows
        self.num_prefills += rows > 1

    def take_back(self, request_id: str) -> None:
        """Return the rows that a request took from the step, if any."""
        rows = self.spent.pop(request_id, 0)
        self.left += rows
        self.num_prefills -= rows > 1

    def _rows(self, plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> float:
        """Rows that the tokens compute, mean over the layers."""
        if not _ends_prompt(plan, num_computed_tokens, num_new_tokens):
            return num_new_tokens
        places = num_computed_tokens, num_computed_tokens + num_new_tokens
        before, after = ([plan.stage_tokens(stage, place) for stage in range(len(plan.kept))] for place in places)
        return self.schedule.mean_over_layers([n - m for m, n in zip(before, after, strict=True)])


def _ends_prompt(plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> bool:
    """Whether the tokens are the part of a pruned prompt that runs in one step."""
    return plan.is_pruned and num_computed_tokens < plan.num_prompt_tokens <= num_computed_tokens + num_new_tokens
