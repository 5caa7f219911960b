"""vLLM's own benchmark client against a server: its inputs, its command line, its results."""

import json
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hidrop.bench.piped import NO_PLUGINS, PipedProcess

STOCK_SERVER = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry")
CHAT_TEMPLATE = (
    "{% for message in messages %}t1 {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)  # parts in the order they were sent; the bench model's tokenizer has one word per token
OFF = {"vllm_xargs": {"hidrop": "off"}}
IMAGE_SIZE = 336


@dataclass(frozen=True)
class Load:
    """The requests that a client sends."""

    requests: int  # all at once, or at most ``concurrency`` of them
    concurrency: int | None  # None: no limit
    images: int  # of each request, all different
    text: int  # tokens of each prompt
    output_tokens: int  # of each answer
    seed: int  # of the pictures: a new one for every load, or the server finds them in its encoder's cache
    off: bool = False  # whether ours is asked to keep every token


@dataclass(frozen=True)
class Latencies:
    """vLLM's figures of a load; times are medians."""

    requests_per_second: float
    ttft_ms: float  # to the first token
    tpot_ms: float  # per further token, mean of a request
    itl_ms: float  # between two tokens; near 0 where several arrive in one read, unlike tpot


class Client(PipedProcess):
    """The parent side of :mod:`vllm_hidrop.bench.client_process`."""

    def __init__(self, model: Path) -> None:
        self.model = model
        super().__init__("vllm_hidrop.bench.client_process", NO_PLUGINS | {"HF_HUB_OFFLINE": "1"})
        self.ask({})

    def run(self, url: str, load: Load) -> Latencies:
        """Send a load by ``vllm.benchmarks.serve``. Raises ValueError: the client or any of the requests failed."""
        with tempfile.NamedTemporaryFile("w", prefix="hidrop-bench-", suffix=".jsonl") as requests:
            requests.writelines(json.dumps({"content": content}) + "\n" for content in contents(load))
            requests.flush()
            found = self.ask({"arguments": self._arguments(url, load, requests.name)})
        if found["completed"] != load.requests:
            raise ValueError(f"{load.requests - found['completed']} of {load.requests} requests to {url} failed")
        medians = (found[f"median_{figure}_ms"] for figure in ("ttft", "tpot", "itl"))
        return Latencies(found["request_throughput"], *medians)

    def _arguments(self, url: str, load: Load, requests: str) -> list[str]:
        return [
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url),
            *("--model", str(self.model), "--dataset-name", "custom_image", "--dataset-path", requests),
            *("--num-prompts", str(load.requests), "--custom-output-len", str(load.output_tokens), "--ignore-eos"),
            *("--temperature", "0", "--disable-shuffle", "--no-oversample", "--disable-tqdm"),
            *("--ready-check-timeout-sec", "0", "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50"),
            *(("--max-concurrency", str(load.concurrency)) if load.concurrency else ()),
            *(("--extra-body", json.dumps(OFF)) if load.off else ()),
        ]


def contents(load: Load) -> list[list[dict[str, Any]]]:
    """Per request, the parts of its message: pictures, then text."""
    return [[*(_picture(load.seed, n, i) for i in range(load.images)), _words(load, n)] for n in range(load.requests)]


def _picture(seed: int, request: int, index: int) -> dict[str, Any]:
    from hidrop_loadtests.pictures import picture_url

    return {"type": "image_url", "image_url": {"url": picture_url((seed, request, index), IMAGE_SIZE)}}


def _words(load: Load, request: int) -> dict[str, Any]:
    """Words of one token each; t0 to t3 are special and would be found inside longer words that start like them."""
    import numpy as np

    numbers = np.random.default_rng((load.seed, request)).integers(4000, 10_000, load.text - 1)
    return {"type": "text", "text": " ".join(f"t{number}" for number in numbers)}


def ask_once(url: str, model: Path, load: Load) -> dict[str, Any]:
    """The answer to a load's first request, with the tokens of its rendered prompt (``prompt_token_ids``)."""
    messages = [{"role": "user", "content": contents(load)[0]}]
    body: dict[str, Any] = {"model": str(model), "messages": messages, "max_tokens": 2, "return_token_ids": True}
    body |= OFF if load.off else {}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer
