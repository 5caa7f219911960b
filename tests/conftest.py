"""Settings every test process needs before vLLM, transformers or OpenMP are first imported.

Property tests draw the same examples every time, so that a failure is the change's; ``--hypothesis-profile=explore``
draws new ones. None has a deadline: machines stall.
"""

import os
import sys
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
V2_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
for name, value in (ENVIRONMENT | (V2_ENVIRONMENT if "--v2" in sys.argv else {})).items():
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
    """``make test-fast`` and ``make test-v2``."""
    parser.addoption("--v2", action="store_true", help="what runs on vLLM's V2 runner, in Triton's interpreter")
    parser.addoption("--fast", action="store_true", help="no server, no training, of the engine parity and blocks only")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests of the V2 runner to its own environment."""
    is_theirs = collection_path == ROOT / "v2"
    return True if is_theirs and not config.getoption("--v2") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What ``--fast`` leaves; the longest files first where several processes take one after the other."""
    if config.getoption("--v2"):
        from tests.v2.choice import chosen

        _keep(config, items, list(chosen(items)))
    if config.getoption("--fast"):
        _keep(config, items, [item for item in items if _is_fast(item)])
    if IS_ONE_OF_SEVERAL:
        items.sort(key=lambda item: _order(item.path))


def _keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    left = set(items).difference(kept)
    config.hook.pytest_deselected(items=list(left))
    items[:] = kept


def _is_fast(item: pytest.Item) -> bool:
    if any(item.get_closest_marker(name) for name in ("slow", "server")) or ROOT / "lab" / "train" in item.path.parents:
        return False
    return item.get_closest_marker("engine") is None or item.path in ENGINE_FILES


def _order(path: Path) -> int:
    folder = path.relative_to(ROOT).parts[0]
    return LONG.index(folder) if folder in LONG else len(LONG)


@pytest.fixture(scope="session", autouse=True)
def no_top_k_kernel(pytestconfig: pytest.Config) -> None:
    """The V2 runner's kernel of top-k and top-p does not run in Triton's interpreter; vLLM has one without Triton."""
    if pytestconfig.getoption("--v2"):
        from vllm.v1.sample.ops import topk_topp_sampler

        topk_topp_sampler.HAS_TRITON = False
