"""Let PyPI's torchvision be imported next to a CPU build of PyTorch.

Knows two operator schemas of torchvision; nothing of vLLM, of models or of pruning.

**Why.** The torchvision wheel on PyPI is linked against CUDA. Next to `torch+cpu` its native
library cannot be loaded. torchvision tolerates that, but then registers shape functions for two
operators that this library would have declared, and `import torchvision` ends in
`RuntimeError: operator torchvision::nms does not exist`. With it fails everything that imports
transformers' image code: `vllm.config` and every multimodal model. Decoding and resizing images
needs neither operator; calling one still raises torchvision's own explanation.

**How.** `vllm_hidrop_torchvision.pth`, installed beside the package, calls `install` in every
Python process of the environment: API server, engine core, workers, vLLM's model-inspection
subprocess. A vLLM plug-in would be too late, because plug-ins load after `vllm.config`. `install`
puts a finder on `sys.meta_path` that acts on one name, `torchvision.extension`, the module that
tries to load the native library. Right after it has run, and only if it says that it has no
operators and PyTorch is a CPU build, the schemas PyTorch does not know are declared. Where torch
and torchvision match, nothing is declared; a torch built for an accelerator keeps its true error.

**When to delete.** When `import torchvision` works without it beside the pinned `torch+cpu`:
`tests/test_torchvision_compat.py` fails on that day.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False  # `typing` and `importlib.abc` would slow the start of every process
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

GUARDED_MODULE = "torchvision.extension"
MISSING_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def install() -> None:
    """Watch for torchvision in this process; calling it again changes nothing."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


class TorchvisionFinder:
    """Finds `torchvision.extension` where Python would, and looks at it after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the usual spec, its loader checked, for the guarded module; else None."""
        if fullname != GUARDED_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = checked(  # type: ignore[method-assign,assignment]
                spec.loader.exec_module
            )
        return spec


def checked(exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Wrap a loader's `exec_module`: look at the module after it has run."""

    def exec_and_check(module: ModuleType) -> None:
        exec_module(module)
        if not module._has_ops():
            declare_missing_schemas()

    return exec_and_check


def declare_missing_schemas() -> list[str]:
    """Declare the operators that `import torchvision` needs and PyTorch does not know.

    Returns:
        The names declared: none when PyTorch knows them already, or was built for an accelerator.
    """
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return []
    known = set(torch._C._dispatch_get_all_op_names())
    missing = [name for name in MISSING_SCHEMAS if name not in known]
    for name in missing:
        torch.library.define(name, MISSING_SCHEMAS[name])
    return missing
