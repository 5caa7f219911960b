"""The child process of ``hidrop verify`` whose decode graphs are those of :mod:`tests.v2.graph_emulation`."""

from contextlib import ExitStack
from typing import Any

from tests.v2.graph_emulation import Emulation
from vllm_hidrop.verify.engine_process import Session, serve

SIZES = [1, 2, 4, 8]


class EmulatedSession(Session):
    """A session whose engine replays graphs on a CPU."""

    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        eager = settings["enforce_eager"]
        self.patches, emulation = ExitStack(), Emulation()
        if not eager:
            self.patches.enter_context(emulation.installed(SIZES))
        facts = super().open(settings | {"enforce_eager": True, "compilation_config": {}, "max_num_seqs": 8})
        if eager:
            return facts
        emulation.capture(self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
        return facts | {"graphs": "FULL_DECODE_ONLY"}

    def close(self) -> dict[str, Any]:
        found = super().close()
        self.patches.close()
        return found


if __name__ == "__main__":
    serve(EmulatedSession())
