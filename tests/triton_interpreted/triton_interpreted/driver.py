"""What Triton asks a backend for its device."""

from typing import Never

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """Launches nothing: the interpreter does not ask it to."""

    @staticmethod
    def is_active() -> bool:
        """It is there."""
        return True

    def get_current_target(self) -> GPUTarget:
        """A target that no compiler knows."""
        return GPUTarget("cpu", "interpreter", 1)

    def get_active_torch_device(self) -> torch.device:
        """Tensors are in the host's memory."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> Never:
        """Refuse: no launcher is compiled."""
        raise NotImplementedError(ty)

    def get_benchmarker(self) -> Never:
        """Refuse: the interpreter's times mean nothing."""
        raise NotImplementedError
