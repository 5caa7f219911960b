"""Seeded mixed traffic: requests of every kind arriving and leaving at random between the steps of one engine."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.engine.harness import Ask, Engine

Answered = list[tuple[tuple[int, ...], str]]
"""Per choice of a request: tokens and finish reason."""


@dataclass(frozen=True)
class Wanted:
    """A request: what it asks, and how it samples."""

    ask: Ask
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def params(self) -> SamplingParams:
        asked = {"temperature": 0.0, "ignore_eos": True, "max_tokens": self.ask.max_tokens} | dict(self.sampling)
        return SamplingParams(**asked, extra_args=dict(self.ask.options), output_kind=RequestOutputKind.FINAL_ONLY)


def alone(running: Engine, wanted: Sequence[Wanted]) -> list[Answered]:
    """Each by itself."""
    return [_answered(running.llm.generate([running.prompt(w.ask)], [w.params()], use_tqdm=False)[0]) for w in wanted]


@dataclass
class Traffic:
    """Random arrivals and aborts.

    Attributes:
        running: the engine.
        wanted: what may be asked.
        rng: decides who comes and who goes.
        busy: stops new arrivals while so many requests run.
    """

    running: Engine
    wanted: Sequence[Wanted]
    rng: random.Random
    busy: int = 12

    def run(self, num_requests: int, abort_share: float) -> dict[str, tuple[int, Answered]]:
        """Serve so many; return which of ``wanted`` each was and its answer, without the aborted.

        Raises:
            AssertionError: the scheduler's books do not add up between two steps.
        """
        engine = self.running.llm.llm_engine
        order = self.rng.sample(range(len(self.wanted)), len(self.wanted))
        came: dict[str, int] = {}
        finished: dict[str, tuple[int, Answered]] = {}
        present: set[str] = set()
        while present or len(came) < num_requests:
            while len(came) < num_requests and len(present) < self.busy and self.rng.random() < 0.6:
                name, which = f"r{len(came)}", order[len(came) % len(order)]
                wanted = self.wanted[which]
                engine.add_request(name, self.running.prompt(wanted.ask), wanted.params())
                came[name] = which
                present.add(name)
            if present and self.rng.random() < abort_share:
                gone = self.rng.choice(sorted(present))
                engine.abort_request([gone])
                present.discard(gone)
            for output in self.running.step():
                if output.finished and output.request_id in present:
                    finished[output.request_id] = came[output.request_id], _answered(output)
                    present.discard(output.request_id)
            assert self.running.scheduler.check_integrity() == []
        return finished


def _answered(output: Any) -> Answered:
    return [(tuple(choice.token_ids), str(choice.finish_reason)) for choice in output.outputs]
