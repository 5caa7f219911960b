"""What the scheduler knows of one request, from its arrival to its last report.

A record lives as long as its request::

    planned ---> ran ---> decided         ran: the worker has run the pruned prompt; unpruned ones stay planned
       |         ^ |         |            decided: the worker has told how many tokens stay (adaptive methods)
       v         | v         |
       +--> preempted <------+            its prompt will run again, by the plan it ran by

The worker's word may come a step late: that of a run before a preemption comes after it, and the next run's then
follows a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.staged.explain import Patches


class Life(StrEnum):
    """Where a request is in its life."""

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
        prefill_plan: what its prompt runs by, now and after a preemption; an adaptive method's decisions stay in it.
        plan: what its caches hold; managers count blocks by it.
        rows_run: of every stage in the prompt's prefill, as the worker ran them; None where the prompt ran dense.
        selection_ms: what the step took for scoring and selecting.
        patches: what every stage ran with, where the request asks.
        num_reused: tokens of the prompt that came from the prefix cache.
        num_returned: blocks given back because fewer tokens stayed than were allowed for.
        encoded: images that the tower ran for this request.
        withheld: images whose pixels the worker has not got: the prompt was admitted behind them.
        report: of the prompt's run, without the blocks; None until it is made, and where it must be made anew.
        is_reported: whether a first report was sent.
        life: see the module.
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
        """Of a request that has just been planned."""
        return cls(plan, plan)

    def ran(self, rows: tuple[int, ...], selection_ms: float) -> None:
        """The worker has run its prompt."""
        self._live(Life.RAN)
        self.rows_run, self.selection_ms = rows, selection_ms

    def decided(self, kept: Sequence[Sequence[int]]) -> None:
        """The worker has told how many tokens of every image every stage keeps; the next run keeps as many."""
        self._live(Life.DECIDED)
        self.prefill_plan = self.prefill_plan.settled(kept)

    def holds(self, schedule: Schedule) -> None:
        """Its caches hold what the decided counts leave of them."""
        assert self.life is Life.DECIDED, f"holds what was decided, and is {self.life}"
        self.plan = self.prefill_plan.after_prefill(schedule)

    def preempted(self) -> None:
        """Its blocks are gone; its prompt will run again."""
        self._live(Life.PREEMPTED)
        self.plan = self.prefill_plan

    def _live(self, life: Life) -> None:
        assert life in NEXT[self.life], f"a request that is {self.life} cannot be {life}"
        self.life, self.report = life, None
