"""Servers that several tests talk HTTP to, each in a process group of its own."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.engine.characters import save_character_tokenizer
from tests.server.harness import Server
from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.verify.tiny_models import make_llava

KEY = "a-secret-of-the-tests"
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}{{ message.content }}
{%- elif message.content -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}<image>{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}{{ tool.function.name }}{%- endfor -%}
{%- if add_generation_prompt -%}:{%- endif -%}
"""
"""With no markers of roles: the model's weights are random."""


@contextmanager
def serving(arguments: Sequence[str], key: str = "none") -> Iterator[Server]:
    """Run a server; nothing of it may be left at the end."""
    others = psutil.Process().children(recursive=True)  # multiprocessing's tracker, from an engine of an earlier test
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the server's process only
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            url = stack.enter_context(local_server(arguments, on_wait=lambda: None))
        processes = set(psutil.Process().children(recursive=True)).difference(others)
        headers = {"Authorization": f"Bearer {key}"}
        http = stack.enter_context(httpx.Client(base_url=url, timeout=120, headers=headers))
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120))
        yield Server(url, http, client, key)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, f"the server left processes behind: {alive}"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Serve the embedded model with its own schedule."""
    with serving([]) as started:
        yield started


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a tiny model that spells, so that it can write JSON: with a key, tools and an own chat template."""
    model = save_character_tokenizer(make_llava(tmp_path_factory.mktemp("spells"), "mistral"))
    template = Path(model) / "template.jinja"
    template.write_text(TEMPLATE)
    settings = {
        "--method": "pyramiddrop",
        "--api-key": KEY,
        "--served-model-name": "tiny",
        "--chat-template": str(template),
        "--tool-call-parser": "hermes",
        "--tool-strict-level": "parameter",
        "--max-model-len": "1024",
        "--dtype": "float32",
        "--block-size": "32",
        "--limit-mm-per-prompt": json.dumps({"image": 4}),
        "--structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    }
    flags = ["--enable-auto-tool-choice", "--enable-request-id-headers", "--enforce-eager"]
    parts = [part for pair in settings.items() for part in pair]
    with serving([str(model), *parts, *flags], KEY) as started:
        yield started
