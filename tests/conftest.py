"""Settings every test process needs before vLLM, transformers or OpenMP are first imported.

Property tests draw the same examples every time, so that a failure is the change's; ``--hypothesis-profile=explore``
draws new ones. None has a deadline: machines stall.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

IS_ONE_OF_SEVERAL = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
ENVIRONMENT = {
    # The engine core runs in the test's own process: its scheduler and runner are at hand.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "2",
    # Loopback only: nothing is downloaded, nothing is reported.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

if IS_ONE_OF_SEVERAL:
    # Not by default: the process that starts the others has set the above, and they inherit it. With two threads each
    # on two cores, every operator waits for a thread that does not run.
    os.environ["OMP_NUM_THREADS"] = "1"
    # vLLM binds an engine's threads to cores, to the same ones in every process.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")

LONG = ("server", "engine", "cli", "lab", "bench")
"""Folders whose files take longest; the files of others fill the gaps at the end."""


ROOT = Path(__file__).parent
ENGINE_FILES = frozenset(
    ROOT / "engine" / f"test_{name}.py" for name in ("oracle_parity", "off_equals_stock", "blocks", "adaptive_parity")
)
"""Of the tests that start an engine, those of ``--fast``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make test-fast``."""
    parser.addoption("--fast", action="store_true", help="no server, no training, of the engine parity and blocks only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What ``--fast`` leaves; the longest files first where several processes take one after the other."""
    if config.getoption("--fast"):
        left = [item for item in items if not _is_fast(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if _is_fast(item)]
    if IS_ONE_OF_SEVERAL:
        items.sort(key=lambda item: _order(item.path))


def _is_fast(item: pytest.Item) -> bool:
    if any(item.get_closest_marker(name) for name in ("slow", "server")) or ROOT / "lab" / "train" in item.path.parents:
        return False
    return item.get_closest_marker("engine") is None or item.path in ENGINE_FILES


def _order(path: Path) -> int:
    folder = path.relative_to(ROOT).parts[0]
    return LONG.index(folder) if folder in LONG else len(LONG)
