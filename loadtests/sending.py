"""Send requests by vLLM's own benchmark client, which times and counts them.

Its request function is wrapped to add clients that go away, a deadline and the time a refusal took; and an answer that
is shorter than asked for counts as failed.
"""

import asyncio
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from hidrop_loadtests.scenarios import Closed, Poisson, Ramp, Scenario
from hidrop_loadtests.traffic import Ask

ENDPOINT_TYPE = "hidrop-loadtest"
CANCELLED, OUT_OF_TIME = "the client went away", "not answered in the scenario's seconds"
GRACE_SECONDS = 60.0
CLIENT_ERRORS = {status.phrase for status in HTTPStatus if 400 <= status < 500} | {
    "Content Too Large",
    "Unprocessable Content",
}  # how vLLM's client reports a 4xx: its phrase in this Python, or in a newer one

Kind = Literal["answered", "cancelled", "refused", "failed"]


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: a server, its model's name, fields of every body, its key, and the key of ``/metrics``."""

    url: str
    model: str
    body: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    metrics_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return _bearer(self.api_key)

    @property
    def metrics_headers(self) -> dict[str, str]:
        """Headers of a request for ``/metrics``."""
        return _bearer(self.metrics_key or self.api_key)


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True)
class Outcome:
    """What became of one request; times in seconds."""

    kind: Kind
    sent_at: float  # on the client's clock
    ttft: float = 0.0  # until the first token
    latency: float = 0.0  # until the last token; without an answer, until the request's end
    itls: tuple[float, ...] = ()  # between tokens
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    bad: str | None = None  # as Ask.bad


@dataclass(frozen=True)
class Sent:
    """The outcomes of a round, in the order of its requests, and how many seconds the round took."""

    outcomes: tuple[Outcome, ...]
    seconds: float


def send(scenario: Scenario, asks: Sequence[Ask], endpoint: Endpoint, deadline: float, quiet: bool = False) -> Sent:
    """Send a round, give up at ``deadline`` (``time.monotonic``). Raises ValueError: vLLM's client itself failed."""
    import numpy as np
    from vllm.benchmarks import serve

    requests = {f"loadtest-{index}": ask for index, ask in enumerate(asks)}
    np.random.seed(scenario.seed)  # vLLM's client draws its gaps from the global generator
    said = io.StringIO()
    limit = deadline - time.monotonic() + GRACE_SECONDS
    running = serve.benchmark(**_arguments(scenario, requests, endpoint, quiet))
    try:
        with _registered(requests, deadline), contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All requests failed")  # the outcomes say so, and may have to
            found = asyncio.run(asyncio.wait_for(running, limit))
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # it would tell of each session that vLLM's client left open
        raise
    except TimeoutError:
        raise ValueError(f"vLLM's client did not end {GRACE_SECONDS:.0f} s after the scenario's time") from None
    except (OSError, AssertionError, KeyError) as error:
        raise ValueError(f"vLLM's client failed: {error!r}; {said.getvalue().strip()[-200:]}") from error
    return Sent(tuple(_outcomes(found, asks, scenario.output_tokens)), found["duration"])


def _arguments(scenario: Scenario, requests: dict[str, Ask], endpoint: Endpoint, quiet: bool) -> dict[str, Any]:
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType

    arrivals = scenario.arrivals
    ramp = arrivals if isinstance(arrivals, Ramp) else None
    return {
        "task_type": TaskType.GENERATION,
        "endpoint_type": ENDPOINT_TYPE,
        "api_url": f"{endpoint.url}/v1/chat/completions",
        "base_url": endpoint.url,
        "model_id": endpoint.model,
        "model_name": endpoint.model,
        "tokenizer": None,
        "input_requests": [
            SampleRequest(
                prompt="",
                prompt_len=0,
                expected_output_len=scenario.output_tokens,
                request_id=request_id,
                timestamp=ask.send_at,
                chat_messages=ask.messages,
                request_overrides=ask.body or None,
            )
            for request_id, ask in requests.items()
        ],
        "logprobs": None,
        "request_rate": arrivals.requests_per_second if isinstance(arrivals, Poisson) else float("inf"),
        "burstiness": 1.0,
        "disable_tqdm": quiet,
        "num_warmups": 0,
        "profile": False,
        "selected_percentile_metrics": [],
        "selected_percentiles": [],
        "ignore_eos": True,
        "goodput_config_dict": {},
        "max_concurrency": arrivals.at_once if isinstance(arrivals, Closed) else None,
        "lora_modules": None,
        "extra_headers": endpoint.headers,
        "extra_body": {"temperature": 0, **endpoint.body},
        "ramp_up_strategy": "linear" if ramp else None,
        "ramp_up_start_rps": ramp.from_requests_per_second if ramp else None,
        "ramp_up_end_rps": ramp.to_requests_per_second if ramp else None,
        "ready_check_timeout_sec": 0,
        "self_timed": any(ask.send_at is not None for ask in requests.values()),
    }


@contextlib.contextmanager
def _registered(requests: dict[str, Ask], deadline: float) -> Iterator[None]:
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS

    ASYNC_REQUEST_FUNCS[ENDPOINT_TYPE] = _request_function(requests, deadline)
    try:
        yield
    finally:
        del ASYNC_REQUEST_FUNCS[ENDPOINT_TYPE]


def _request_function(requests: dict[str, Ask], deadline: float) -> Callable[..., Any]:
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput, async_request_openai_chat_completions

    async def request(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        started, left = time.perf_counter(), deadline - time.monotonic()
        patience = requests[request_func_input.request_id].cancel_after
        leaves = patience is not None and patience < left
        try:
            async with asyncio.timeout(patience if leaves else max(0.0, left)):
                output = await async_request_openai_chat_completions(request_func_input, session)
        except TimeoutError:
            error = CANCELLED if leaves else OUT_OF_TIME
            output = RequestFuncOutput(success=False, error=error, start_time=started)
        if not output.success:
            output.latency = time.perf_counter() - started
        if pbar is not None:
            pbar.update(1)
        return output

    return request


def _outcomes(found: dict[str, Any], asks: Sequence[Ask], wanted_tokens: int) -> Iterator[Outcome]:
    columns = ("errors", "start_times", "ttfts", "latencies", "itls", "output_lens", "generated_texts")
    for ask, row in zip(asks, zip(*(found[column] for column in columns), strict=True), strict=True):
        error, sent_at, ttft, latency, itls, output_tokens, text = row
        if not error and output_tokens != wanted_tokens and ask.bad is None:
            # An error in the middle of a stream, or a stream without its end, is a success to vLLM's client.
            error = f"the stream ended before its {wanted_tokens} tokens"
        lines = error.strip().splitlines()
        yield Outcome(
            _kind(error), sent_at, ttft, latency, tuple(itls), output_tokens, text, lines[-1] if lines else "", ask.bad
        )


def _kind(error: str) -> Kind:
    if not error:
        return "answered"
    if error == CANCELLED:
        return "cancelled"
    return "refused" if error in CLIENT_ERRORS else "failed"
