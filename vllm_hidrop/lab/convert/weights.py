"""Read the tensors of one weight file, one at a time, from safetensors or PyTorch's pickle. Knows no model."""

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the element types a converted weight may have."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read; ``dtype`` is safetensors' name, or torch's where it has none."""

    shape: tuple[int, ...]
    dtype: str


class Weights(Protocol):
    """The tensors of an open file."""

    def names(self) -> list[str]:
        """All tensors, in the order of the file."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and type, without reading the tensor."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in host memory."""
        ...


@dataclass(frozen=True)
class _Safetensors:
    file: Any

    def names(self) -> list[str]:
        return list(self.file.keys())

    def info(self, name: str) -> TensorInfo:
        view = self.file.get_slice(name)
        return TensorInfo(tuple(view.get_shape()), str(view.get_dtype()))

    def tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)


@dataclass(frozen=True)
class _Pickled:
    tensors: dict[str, torch.Tensor]

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(tuple(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype)))

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open a ``.safetensors`` or PyTorch file; memory is used for the tensors asked for only.

    A PyTorch file from before version 1.6 cannot be mapped and is read whole.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _Safetensors(file)
        else:
            yield _Pickled(_load(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the weights in {path.name}, is the file complete? {first_line}") from error


def _load(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path.name} does not hold tensors by name")
    return content
