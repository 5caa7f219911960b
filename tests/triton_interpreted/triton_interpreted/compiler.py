"""What Triton asks a backend for its compiler."""

from types import ModuleType
from typing import Any, Never

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpretedBackend(BaseBackend):
    """Refuses to compile: a kernel that asks for it is one that the interpreter does not run."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        """Only the driver's own."""
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        """Names the version of this compiler."""
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> Never:
        """Refuse."""
        raise NotImplementedError("TRITON_INTERPRET=1 is not set: there is no compiler for a CPU")

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any = None) -> Never:
        """Refuse."""
        raise NotImplementedError

    def load_dialects(self, context: Any) -> Never:
        """Refuse."""
        raise NotImplementedError

    def get_module_map(self) -> dict[str, ModuleType]:
        """No module of the language is replaced."""
        return {}
