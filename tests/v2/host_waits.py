"""Finds where a step would make the host wait for a device, on a machine that has none.

The runner's tensors, the model's weights and all that is computed of them or uploaded by vLLM's asynchronous copy count
as the device's. Reading one of them on the host, or copying host memory to the device in another way, is a wait.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.v2.graph_emulation import storage, tensors

READS = {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"}
UPLOAD = "async_tensor_h2d"


def caller() -> str:
    """Path and function outside PyTorch and this file that is running."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}"


def site() -> str:
    """File and function that are running."""
    return caller().rpartition("/")[2]


def is_ours() -> bool:
    """Whether they are of this project."""
    return "/vllm_hidrop/" in caller()


class Watch:
    """While entered, notes the waits of our code in ``found``, by kind and site."""

    def __init__(self, runner: Any) -> None:
        self.device = runner.device
        self.on_device: set[int] = set()
        self.alive: list[torch.Tensor] = []
        self.found: Counter[str] = Counter()
        self.add(tensors([list(runner.model.parameters()), list(runner.model.buffers()), runner.kv_caches]))
        holders = runner.req_states, runner.input_buffers, runner.block_tables, runner.inputs, runner.inputs.dropped
        for holder in holders:
            self.add(value for value in vars(holder).values() if isinstance(value, torch.Tensor))
        for table in runner.block_tables.block_tables:
            self.add([table.gpu])

    def add(self, found: Iterable[torch.Tensor]) -> None:
        """Note tensors of the device."""
        for tensor in found:
            self.on_device.add(storage(tensor))
            self.alive.append(tensor)

    def has(self, tensor: Any) -> bool:
        """Whether a tensor is the device's."""
        return isinstance(tensor, torch.Tensor) and storage(tensor) in self.on_device

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        self.stack.enter_context(_Calls(self))
        self.stack.enter_context(_Operators(self))
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith(("vllm.", "vllm_hidrop.")) and UPLOAD in vars(module):
                self.stack.enter_context(patch.object(module, UPLOAD, self._upload))
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def _upload(self, data: Any, device: Any = None, dtype: Any = None, out: Any = None) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            copy = torch.as_tensor(data).to(dtype=dtype, copy=True)
            uploaded = copy if out is None else out.copy_(copy)
        self.add([uploaded])
        return uploaded


class _Calls(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, watch = getattr(func, "__name__", ""), self.watch
        if name in READS and args and watch.has(args[0]) and is_ours():
            watch.found[f"read by {name} in {site()}"] += 1
        is_upload = name == "to" and any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        if is_upload and not watch.has(args[0]) and is_ours():
            watch.found[f"copy from pageable memory in {site()}"] += 1
        if name == "copy_" and watch.has(args[0]) and not watch.has(args[1]) and is_ours():
            watch.found[f"copy from pageable memory in {site()}"] += 1
        result = func(*args, **kwargs)
        if kwargs.get("device") is not None:
            watch.add(tensors(result))
        return result


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(self.watch.has, tensors((args, kwargs)))):
            self.watch.add(tensors(result))
            arguments = zip(func._schema.arguments, args, strict=False)
            self.watch.add(tensors([value for of, value in arguments if of.alias_info and of.alias_info.is_write]))
        return result
