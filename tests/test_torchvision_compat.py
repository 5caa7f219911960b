"""The torchvision of PyPI next to a CPU build of PyTorch."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from vllm_hidrop import torchvision_compat
from vllm_hidrop.torchvision_compat import MISSING_SCHEMAS, TorchvisionFinder, checked, declare_missing_schemas


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter in which warnings are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


WITHOUT_HOOK = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "TorchvisionFinder"]
"""


def test_torchvision_imports_in_a_new_process_and_says_what_it_cannot_do() -> None:
    code = (
        "import torch, torchvision\n"
        "from torchvision.io import decode_image\n"
        "if not torchvision.extension._has_ops():\n"
        "    try: torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "    except RuntimeError as error: assert 'custom C++ ops' in str(error)\n"
        "    else: raise AssertionError\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_vllm_configuration_imports_in_a_new_process() -> None:
    done = subprocess.run([sys.executable, "-c", "import vllm.config"], check=False, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_hook_is_still_needed_where_torchvision_is_built_for_cuda() -> None:
    """When this fails, delete `torchvision_compat.py`, its .pth file and these tests."""
    import torchvision

    if torchvision.extension._has_ops():
        pytest.skip("torch and torchvision match on this machine")
    done = run("-c", WITHOUT_HOOK + "import torchvision")
    assert "operator torchvision::nms does not exist" in done.stderr


def test_the_hook_loads_nothing_heavy_at_start() -> None:
    done = run("-c", "import sys; print({'torch', 'torchvision', 'vllm'} & sys.modules.keys())")
    assert done.stdout == "set()\n"


def test_installing_twice_leaves_one_finder() -> None:
    torchvision_compat.install()
    torchvision_compat.install()
    assert sum(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path) == 1


@pytest.mark.parametrize("name", ["torchvision", "torchvision.ops", "torch", "vllm"])
def test_the_finder_leaves_other_names_alone(name: str) -> None:
    assert TorchvisionFinder().find_spec(name, None) is None


def test_operators_that_exist_are_not_declared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision  # noqa: F401  (from here on the operators exist, from either source)

    declared: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: declared.append(name))
    assert declare_missing_schemas() == []
    assert declared == []


def test_only_operators_that_are_unknown_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", lambda: ["torchvision::nms"])
    declared: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: declared.append(name))
    assert declare_missing_schemas() == ["torchvision::qnms"] == declared


def test_a_torch_built_for_cuda_keeps_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", list)
    assert declare_missing_schemas() == []


@pytest.mark.parametrize("has_ops", [True, False])
def test_schemas_are_declared_only_if_torchvision_found_no_operators(
    has_ops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torchvision_compat, "declare_missing_schemas", lambda: calls.extend(MISSING_SCHEMAS))
    module = ModuleType("torchvision.extension")
    checked(lambda ran: setattr(ran, "_has_ops", lambda: has_ops))(module)
    assert calls == ([] if has_ops else list(MISSING_SCHEMAS))
