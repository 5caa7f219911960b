"""One server for all tests that talk HTTP, in a process group of its own."""

from collections.abc import Iterator

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.server.harness import Server
from vllm_hidrop.commands.local_server import local_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Serve the embedded model with its own schedule; nothing of it may be left at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with local_server([], on_wait=lambda: None) as url:
            processes = psutil.Process().children(recursive=True)
            with (
                httpx.Client(base_url=url, timeout=120) as http,
                OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
            ):
                yield Server(url, http, client)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, f"the server left processes behind: {alive}"
