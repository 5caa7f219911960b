"""The child process of ``hidrop verify`` with faults put in: the setting ``fault`` names one of :data:`FAULTS`."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np

from vllm_hidrop.verify.engine_process import Session, serve


def _worst_tokens(stack: ExitStack) -> None:
    from vllm_hidrop.methods.hidrop import HiDrop

    own = HiDrop.score
    stack.enter_context(patch.object(HiDrop, "score", lambda self, signals: -own(self, signals)))


def _shifted_slots(stack: ExitStack) -> None:
    """From the 40th place on, keys and values are written one slot too late."""
    from vllm_hidrop.runners.block_tables import StackedTables

    own = StackedTables.slots

    def slots(self: Any, groups: Any, rows: Any, places: Any) -> Any:
        return own(self, groups, rows, places + (places >= 40).astype(np.int64))

    stack.enter_context(patch.object(StackedTables, "slots", slots))


def _rows_in_other_places(stack: ExitStack) -> None:
    from vllm_hidrop.staged.rows import scatter

    stack.enter_context(patch("vllm_hidrop.staged.loop.scatter", lambda *given: scatter(*given).roll(1, dims=0)))


def _other_logits(stack: ExitStack) -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    own = LogitsProcessor.forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        return own(self, *given, **named).roll(1, dims=1)

    stack.enter_context(patch.object(LogitsProcessor, "forward", forward))


def _one_block_too_many(stack: ExitStack) -> None:
    from vllm_hidrop.engine import report

    own = report.with_blocks

    def with_blocks(*given: Any) -> dict[str, Any]:
        told = own(*given)
        told["stages"][-1]["kv_blocks"] += 1
        return told

    for module in ("report", "scheduler"):
        stack.enter_context(patch(f"vllm_hidrop.engine.{module}.with_blocks", with_blocks))


FAULTS: dict[str, Callable[[ExitStack], None] | None] = {
    "the worst tokens are kept": _worst_tokens,
    "slots are shifted": _shifted_slots,
    "rows come back in other places": _rows_in_other_places,
    "other logits": _other_logits,
    "a block too many": _one_block_too_many,
    "a block is not given back": None,
    "the process ends": None,
}


class FaultySession(Session):
    """A session whose engine has the fault until it is closed."""

    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.fault = settings.pop("fault")
        self.patches = ExitStack()
        put_in = FAULTS[self.fault]
        if put_in is not None:
            put_in(self.patches)
        return super().open(settings)

    def ask(self, questions: list[dict[str, Any]]) -> dict[str, Any]:
        if self.fault == "the process ends":
            raise SystemExit(3)
        return super().ask(questions)

    def close(self) -> dict[str, Any]:
        if self.fault == "a block is not given back":
            self.pool.get_new_blocks(1)
        found = super().close()
        self.patches.close()
        return found


if __name__ == "__main__":
    serve(FaultySession())
