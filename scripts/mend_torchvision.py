"""Mend the torchvision of this environment so that it can be imported beside a CPU build of PyTorch.

**Why.** PyPI's torchvision is linked against CUDA. Beside ``torch+cpu`` its native library cannot be loaded, which it
tolerates; but then it registers shape functions for two operators that this library would have declared, and
``import torchvision`` ends in ``RuntimeError: operator torchvision::nms does not exist``, and so does importing
``vllm.config`` or a multimodal model. Decoding and resizing need neither operator; calling one still raises
torchvision's own explanation. The lock file cannot name torchvision's CPU build: only PyTorch's own index has it.

**How.** ``make install`` and the CPU image run this file after installing the lock file. It appends :data:`MEND` to
``torchvision/extension.py``, which loads the native library. Where torch and torchvision match, the lines do nothing.
Beside an unmended torchvision, ``hidrop serve`` says what to install.

**When to delete.** When the lock file can name ``torchvision==...+cpu``, or ``import torchvision`` works without it:
``tests/test_mend_torchvision.py`` fails on that day.
"""

import os
from importlib.util import find_spec
from pathlib import Path

HEADLINE = "# Added by scripts/mend_torchvision.py of vllm_hidrop."
MEND = f"""

{HEADLINE}
if not _has_ops() and torch.version.cuda is None and torch.version.hip is None:
    for _name in ("torchvision::nms", "torchvision::qnms"):
        if _name not in torch._C._dispatch_get_all_op_names():
            torch.library.define(_name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def mend(extension: Path) -> bool:
    """Append :data:`MEND` to a file; False when it is there already."""
    text = extension.read_text(encoding="utf-8")
    if HEADLINE in text:
        return False
    mended = extension.with_suffix(".mended")  # a new file: the old one may be a hard link into an installer's cache
    mended.write_text(text + MEND, encoding="utf-8")
    os.replace(mended, extension)
    return True


def installed() -> Path:
    """``torchvision/extension.py`` of this environment, found without an import. Raises SystemExit: there is none."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("mend_torchvision: torchvision is not installed here")
    return Path(spec.origin).with_name("extension.py")


if __name__ == "__main__":
    print("mended" if mend(installed()) else "mended already", installed())
