"""What a CUDA graph is, on a CPU: vLLM's own capture code runs, and replays answer as they would on a device.

A capture records the operators that PyTorch dispatches, with their very tensors; a replay runs those and no Python of
the model. So host numbers are baked in and addresses are those of the capture: an adapter that makes a new tensor where
a graph reads an old one answers wrongly here as there. Refused while a graph is captured, as on a device: reads by the
host, shapes that depend on data, and tensors that live neither in the graph nor as long as the engine.

Not emulated: streams and their races, pinned buffers, memory, errors of the driver, FlashAttention's and FlashInfer's
builders.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from vllm import _custom_ops
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

READ_BY_HOST = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu", "pin_memory"}
SHAPED_BY_DATA = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "unique_dim"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_"}
UNINITIALISED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class NotCapturableError(RuntimeError):
    """A capture met what a CUDA graph cannot hold."""


def storage(tensor: torch.Tensor) -> int:
    """Address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph:
    """In place of ``torch.cuda.CUDAGraph``.

    Attributes:
        operators: (function, arguments, keyword arguments, the new tensors it wrote) in order.
        made: storages made in the graph.
    """

    def __init__(self) -> None:
        self.operators: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self.made: set[int] = set()
        self.alive: list[Any] = []
        self.num_replays = 0
        self.emulation: Emulation

    def replay(self) -> None:
        """Run the recorded operators on the recorded tensors."""
        self.num_replays += 1
        for function, arguments, keywords, wrote in self.operators:
            now, named = tree_map(self.emulation.rebuilt, (arguments, keywords))
            for old, new in zip(wrote, tensors(function(*now, **named)), strict=False):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READ_BY_HOST:
            raise NotCapturableError(f"the host reads a tensor: {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Record(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        is_masked = name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        if name in SHAPED_BY_DATA or is_masked:
            raise NotCapturableError(f"a shape depends on data: {func}")
        read = tensors((args, kwargs))
        for tensor in read:
            # Without dimensions: the handle of a CPU kernel, a constant.
            if tensor.numel() and tensor.dim() and storage(tensor) not in self.graph.made | self.graph.emulation.static:
                raise NotCapturableError(f"{name} reads a tensor {tuple(tensor.shape)} that is gone at the next replay")
        result = func(*args, **kwargs)
        made = tensors(result)
        self.graph.made |= {storage(tensor) for tensor in made}
        self.graph.alive.append((args, kwargs, result))
        known = {storage(tensor) for tensor in read}
        new = [tensor for tensor in made if storage(tensor) not in known]
        is_view = made and not new and not func._schema.is_mutable
        if name not in UNINITIALISED and not is_view:
            self.graph.operators.append((func, args, kwargs, new))
        return result


class Emulation:
    """Decode graphs of an engine's V2 runner.

    Attributes:
        static: storages that live as long as the engine.
        plans: keyword arguments of the CPU kernel's work plans, by address: a plan is made outside graphs, anew for
            every step, as FlashAttention's builder does.
    """

    def __init__(self) -> None:
        self.static: set[int] = set()
        self.plans: dict[int, dict[str, Any]] = {}
        self.alive: list[torch.Tensor] = []
        self.is_capturing = False
        self.runner: Any = None
        self.make_plan = _custom_ops.cpu_attn_get_scheduler_metadata

    def rebuilt(self, value: Any) -> Any:
        """A work plan for the sequence lengths of now, in place of that of the capture; any other value as it is."""
        if isinstance(value, torch.Tensor) and value.data_ptr() in self.plans:
            return self.make_plan(**self.plans[value.data_ptr()])
        return value

    def _plan(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        plan: torch.Tensor = self.make_plan(*arguments, **keywords)
        if self.is_capturing:
            self.plans[plan.data_ptr()] = keywords
            self.keep([plan])
        return plan

    def keep(self, kept: Iterable[torch.Tensor]) -> None:
        """Note tensors that live as long as the engine."""
        for tensor in kept:
            self.static.add(storage(tensor))
            self.alive.append(tensor)

    @contextmanager
    def record(self, graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        """In place of ``torch.cuda.graph``."""
        graph.emulation = self
        # Made by the first forward before any capture; every replay writes its result there.
        self.keep(tensors([self.runner.cudagraph_manager.hidden_states]))
        with _NoReads(), _Record(graph):
            yield

    @contextmanager
    def installed(self, sizes: list[int]) -> Iterator[Self]:
        """Let engines that start while entered capture graphs of ``sizes`` requests; capture with :meth:`capture`."""
        initialize = GPUModelRunner.initialize_kv_cache

        def with_graphs(runner: Any, *args: Any, **kwargs: Any) -> None:
            config = runner.compilation_config
            config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, max(sizes)
            initialize(runner, *args, **kwargs)

        support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        with ExitStack() as stack:
            for target, name, value in (
                (torch.cuda, "CUDAGraph", Graph),
                (torch.cuda, "graph", self.record),
                (_custom_ops, "cpu_attn_get_scheduler_metadata", self._plan),
                (cudagraph_utils, "graph_capture", lambda device: nullcontext()),
                (cudagraph_utils, "capture_pool", lambda pool, config: nullcontext(pool)),
                (CPUAttentionMetadataBuilder, "_cudagraph_support", support),
                (type(current_platform), "get_global_graph_pool", lambda self=None: None),
                (GPUModelRunner, "initialize_kv_cache", with_graphs),
            ):
                stack.enter_context(patch.object(target, name, value))
            yield self

    def capture(self, runner: Any) -> dict[Any, Graph]:
        """Capture the runner's graphs; what it may read are weights, caches and the buffers of vLLM and of ours."""
        for module in runner.model.modules():
            self.keep(value for value in vars(module).values() if isinstance(value, torch.Tensor))
            if hasattr(module, "use_direct_call"):
                module.use_direct_call = True  # the attention operator's own work is recorded, not its Python
        self.keep(tensors([list(runner.model.parameters()), list(runner.model.buffers())]))
        self.keep(tensors(runner.kv_caches))
        holders = (runner.input_buffers, runner.block_tables, runner.model_state.encoder_runner)
        for holder in (*holders, getattr(runner, "inputs", None)):
            self.keep(tensors([] if holder is None else list(vars(holder).values())))
        self.keep([runner.ids] if hasattr(runner, "ids") else [])
        self.runner = runner
        self.is_capturing = True
        runner.capture_model(profile_only=True)
        self.is_capturing = False
        graphs: dict[Any, Graph] = runner.cudagraph_manager.graphs
        return graphs
