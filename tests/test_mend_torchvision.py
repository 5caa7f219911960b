"""The torchvision of PyPI beside a CPU build of PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torchvision

from scripts.mend_torchvision import HEADLINE, MEND, installed, mend


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_torchvision_imports_in_a_new_process_and_says_what_it_cannot_do() -> None:
    done = run(
        "import torch, torchvision\n"
        "from torchvision.io import decode_image\n"
        "if not torchvision.extension._has_ops():\n"
        "    try: torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "    except RuntimeError as error: assert 'custom C++ ops' in str(error)\n"
        "    else: raise AssertionError\n"
    )
    assert done.returncode == 0, done.stderr


def test_vllm_configuration_imports_in_a_new_process() -> None:
    done = subprocess.run([sys.executable, "-c", "import vllm.config"], check=False, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_mend_is_still_needed_where_torchvision_is_built_for_cuda(tmp_path: Path) -> None:
    """When this fails, delete `scripts/mend_torchvision.py`, what calls it, and these tests."""
    if torchvision.extension._has_ops():
        pytest.skip("torch and torchvision match on this machine")
    package = installed().parent
    (tmp_path / "torchvision").mkdir()
    for each in package.iterdir():
        if each.name not in ("extension.py", "__pycache__"):
            (tmp_path / "torchvision" / each.name).symlink_to(each)
    stock = installed().read_text(encoding="utf-8").partition(HEADLINE)[0]
    (tmp_path / "torchvision" / "extension.py").write_text(stock, encoding="utf-8")
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchvision")
    assert "operator torchvision::nms does not exist" in done.stderr


def test_a_file_is_mended_once(tmp_path: Path) -> None:
    extension = tmp_path / "extension.py"
    extension.write_text("before = 1\n")
    assert mend(extension)
    assert not mend(extension)
    assert extension.read_text() == "before = 1\n" + MEND
    assert list(tmp_path.iterdir()) == [extension]


STUB = """
class Cpp:
    def _dispatch_get_all_op_names(self): return {known}
class Library:
    def define(self, name, schema): print(name)
class Version:
    cuda, hip = {cuda}, None
class torch:
    _C, library, version = Cpp(), Library(), Version()
def _has_ops(): return {has_ops}
"""


@pytest.mark.parametrize(
    ("has_ops", "cuda", "known", "declared"),
    [
        (False, None, [], ["torchvision::nms", "torchvision::qnms"]),
        (False, None, ["torchvision::nms"], ["torchvision::qnms"]),
        (True, None, [], []),
        (False, "13.0", [], []),
    ],
    ids=["nothing works", "one is known", "the library loads", "torch for CUDA keeps its own error"],
)
def test_only_operators_that_are_missing_are_declared(
    has_ops: bool, cuda: str | None, known: list[str], declared: list[str]
) -> None:
    done = run(STUB.format(has_ops=has_ops, cuda=repr(cuda), known=known) + MEND)
    assert (done.stdout.split(), done.stderr) == (declared, "")
