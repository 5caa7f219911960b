"""Settings every test process needs before vLLM, transformers or OpenMP are first imported.

Property tests draw the same examples every time, so that a failure is the change's; ``--hypothesis-profile=explore``
draws new ones. None has a deadline: machines stall.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

IS_ONE_OF_SEVERAL = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
ENVIRONMENT = {
    # The engine core runs in the test's own process: its scheduler and runner are at hand.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1" if IS_ONE_OF_SEVERAL else "2",
    # Loopback only: nothing is downloaded, nothing is reported.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

if IS_ONE_OF_SEVERAL:
    # vLLM binds an engine's threads to cores, to the same ones in every process.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")

SHARED_SERVERS = ("server", "guarded")
"""Fixtures that start a server for a whole session; the files that use one run in one process."""
LONG = ("server", "engine", "cli", "training", "conversion", "bench")
"""Folders whose files take longest; the files of others fill the gaps at the end."""


@pytest.hookimpl(wrapper=True)  # before pytest-xdist's own, which reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Give pytest-xdist groups: whole files, those that share a server together; the longest come first.

    A group's tests run in one process, in order, so that fixtures of files and sessions are made once.
    """
    if getattr(config.option, "loadgroup", False):  # set in the processes of --dist loadgroup
        uses: dict[Path, set[str]] = {}
        for item in items:
            uses.setdefault(item.path, set()).update(getattr(item, "fixturenames", ()))
        for item in items:
            shared = next((name for name in SHARED_SERVERS if name in uses[item.path]), None)
            item.add_marker(pytest.mark.xdist_group(shared or item.path.relative_to(config.rootpath).as_posix()))
        items.sort(key=lambda item: _order(item.path))
    yield


def _order(path: Path) -> int:
    folder = path.parent.name
    return LONG.index(folder) if folder in LONG else len(LONG)
