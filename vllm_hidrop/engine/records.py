"""What the scheduler knows of one request, from its arrival to its last report.

::

    planned ---> ran ---> decided         ran: the worker has run the pruned prompt; unpruned ones stay planned
       |         ^ |         |            decided: the worker has reported its counts (adaptive methods)
       v         | v         |
       +--> preempted <------+            the prompt will run again by the same plan

The worker may report a run a step late, after the request was preempted; the next run's report then finds it ran.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.staged.explain import Patches


class Life(StrEnum):
    """The state of a request."""

    PLANNED = "planned"
    RAN = "ran"
    DECIDED = "decided"
    PREEMPTED = "preempted"


NEXT = {
    Life.PLANNED: {Life.RAN, Life.PREEMPTED},
    Life.RAN: {Life.RAN, Life.DECIDED, Life.PREEMPTED},
    Life.DECIDED: {Life.RAN, Life.PREEMPTED},
    Life.PREEMPTED: {Life.RAN, Life.PREEMPTED},
}


@dataclass(slots=True)
class Record:
    """One request.

    Attributes:
        prefill_plan: by which its prompt runs, again after a preemption; an adaptive method's decided counts stay.
        plan: by which managers count its blocks: what its caches hold.
        rows_run: per stage, rows of the whole prompt, as the worker reported; None where the prompt ran dense.
        selection_ms: time that the prompt's step spent on scoring and selecting.
        patches: vision tokens that every stage ran, where the request asks.
        num_reused: prompt tokens that came from the prefix cache.
        num_returned: blocks freed because fewer tokens stayed than the upper bounds allowed.
        encoded: images that the tower ran for this request.
        withheld: images whose pixels the worker does not have, because the prompt was admitted behind them.
        report: of the prompt's run, without the blocks; None until it is made, and whenever ``life`` changes.
        is_reported: whether a first report was sent.
    """

    prefill_plan: Plan
    plan: Plan
    rows_run: tuple[int, ...] | None = None
    selection_ms: float = 0.0
    patches: Patches | None = None
    num_reused: int = 0
    num_returned: int = 0
    encoded: set[int] = field(default_factory=set)
    withheld: set[int] = field(default_factory=set)
    report: dict[str, Any] | None = None
    is_reported: bool = False
    life: Life = Life.PLANNED

    @classmethod
    def of(cls, plan: Plan) -> "Record":
        """The record of a request that has just been planned."""
        return cls(plan, plan)

    def ran(self, rows: tuple[int, ...], selection_ms: float) -> None:
        """Note that the worker has run the prompt."""
        self._enter(Life.RAN)
        self.rows_run, self.selection_ms = rows, selection_ms

    def decided(self, kept: Sequence[Sequence[int]]) -> None:
        """Note the worker's counts, ``kept[stage][image]`` tokens; after a preemption the prompt runs by them."""
        self._enter(Life.DECIDED)
        self.prefill_plan = self.prefill_plan.settled(kept)

    def holds(self, schedule: Schedule) -> None:
        """Count blocks by the decided counts from now on: the caches hold no more."""
        assert self.life is Life.DECIDED, f"holds what was decided, and is {self.life}"
        self.plan = self.prefill_plan.after_prefill(schedule)

    def preempted(self) -> None:
        """Note that the blocks are gone and the prompt will run again."""
        self._enter(Life.PREEMPTED)
        self.plan = self.prefill_plan

    def _enter(self, life: Life) -> None:
        assert life in NEXT[self.life], f"a request that is {self.life} cannot be {life}"
        self.life, self.report = life, None
