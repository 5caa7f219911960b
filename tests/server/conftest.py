"""One server for all tests that talk HTTP, in a process group of its own."""

from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.server.harness import Server
from vllm_hidrop.commands.local_server import local_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Serve the embedded model with its own schedule; nothing of it may be left at the end."""
    others = psutil.Process().children(recursive=True)  # multiprocessing's tracker, from an engine of an earlier test
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the server's process only
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            url = stack.enter_context(local_server([], on_wait=lambda: None))
        processes = set(psutil.Process().children(recursive=True)).difference(others)
        http = stack.enter_context(httpx.Client(base_url=url, timeout=120))
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120))
        yield Server(url, http, client)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, f"the server left processes behind: {alive}"
