"""Workers whose model runner is staged, one per platform."""

from importlib import import_module
from typing import Any

from vllm_hidrop.plan.planner import Planner


def staged_worker(base: Any) -> type:
    """A subclass of vLLM's worker class ``base`` that makes its runner staged once it is constructed."""

    class StagedWorker(base):
        def init_device(self) -> None:
            super().init_device()
            planner = Planner.from_vllm_config(self.vllm_config)
            if planner.is_staged:
                # Imported here: the V2 adapter needs Triton, which a machine without V2 may lack.
                version = "v2" if self.use_v2_model_runner else "v1"
                import_module(f"vllm_hidrop.runners.{version}").make_staged(self.model_runner, planner)

    StagedWorker.__qualname__ = StagedWorker.__name__ = f"Staged{base.__name__}"
    return StagedWorker


def __getattr__(name: str) -> Any:
    """Make a platform's worker class on demand: the other platform's cannot be imported."""
    if name == "StagedCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        return staged_worker(CPUWorker)
    if name == "StagedGPUWorker":
        from vllm.v1.worker.gpu_worker import Worker

        return staged_worker(Worker)
    raise AttributeError(name)
