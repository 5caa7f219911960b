"""No pruning: every layer holds every vision token."""

from dataclasses import dataclass

from vllm_hidrop.methods.base import Method, ModelShape
from vllm_hidrop.plan.schedule import Schedule


@dataclass(frozen=True)
class NoPruning(Method):
    """One stage that keeps all; the engine then runs vLLM's own path.

    **Source** none. **Differs** nothing. **Options** none.
    """

    name = "none"
    paper = "-"
    summary = "every layer holds every vision token; equal to stock vLLM"

    def schedule(self, shape: ModelShape) -> Schedule:
        """A single stage."""
        return Schedule.of({0: "all"}, shape.num_layers)
