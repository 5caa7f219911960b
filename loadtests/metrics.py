"""What a server counted between two moments, from ``/metrics``; a server without our metrics has no savings to show."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from hidrop_loadtests.sending import Endpoint

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
OURS = "vllm_hidrop_"
RUN_AND_DENSE = {  # a saving's title -> counters of what was run or held, and of what a dense server would
    "layer tokens of prefills": ("vllm_hidrop_layer_tokens_run_total", "vllm_hidrop_layer_tokens_dense_total"),
    "KV blocks held": ("vllm_hidrop_kv_blocks_held_total", "vllm_hidrop_kv_blocks_dense_total"),
    "KV bytes held": ("vllm_hidrop_kv_bytes_held_total", "vllm_hidrop_kv_bytes_dense_total"),
    "prefill FLOPs": ("vllm_hidrop_prefill_flops_run_total", "vllm_hidrop_prefill_flops_dense_total"),
}
LATENCIES = {
    "ttft": "vllm:time_to_first_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
}
HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def read(endpoint: Endpoint) -> Samples:
    """Every sample of ``/metrics`` by name and labels. Raises ValueError: no answer, or not a 2xx."""
    try:
        response = httpx.get(f"{endpoint.url}/metrics", headers=endpoint.metrics_headers, timeout=30)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ValueError(f"{endpoint.url}/metrics: {error}") from None
    families = text_string_to_metric_families(response.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def idle_after(endpoint: Endpoint, most_seconds: float) -> float | None:
    """Seconds until no request is held and ``/ready``, or else ``/health``, is 200; None after ``most_seconds``."""
    started = time.monotonic()
    while True:
        if _holds_nothing(endpoint) and _is_ready(endpoint):
            return time.monotonic() - started
        if time.monotonic() - started > most_seconds:
            return None
        time.sleep(0.2)


def _holds_nothing(endpoint: Endpoint) -> bool:
    try:
        samples = read(endpoint)
    except ValueError:  # a slow server may be in time yet
        return False
    return not any(value for (name, _), value in samples.items() if name in HELD)


def _is_ready(endpoint: Endpoint) -> bool:
    for path in ("/ready", "/health"):
        try:
            status = httpx.get(endpoint.url + path, headers=endpoint.headers, timeout=10).status_code
        except httpx.HTTPError:
            return False
        if status != httpx.codes.NOT_FOUND:
            return status == httpx.codes.OK
    return False


@dataclass(frozen=True)
class Growth:
    """How much each sample grew between two readings."""

    samples: Samples

    @classmethod
    def between(cls, before: Samples, after: Samples) -> "Growth":
        """The later reading less the earlier one, for counters and histograms; a gauge's difference says nothing."""
        return cls({key: value - before.get(key, 0.0) for key, value in after.items()})

    @classmethod
    def joined(cls, growths: Sequence["Growth"]) -> "Growth":
        """The growth of several spans of time, added up."""
        samples: Samples = {}
        for growth in growths:
            for key, value in growth.samples.items():
                samples[key] = samples.get(key, 0.0) + value
        return cls(samples)

    def total(self, name: str, **labels: str) -> float | None:
        """Sum over all series of a counter that have these labels; None if there is no such series."""
        wanted = set(labels.items())
        found = [value for (own, have), value in self.samples.items() if own == name and wanted <= set(have)]
        return sum(found) if found else None

    def latency_ms(self, name: str) -> dict[str, float] | None:
        """Mean and percentiles in ms of a histogram of seconds, interpolated in its buckets; None if it is empty."""
        count, seconds = self.total(f"{name}_count"), self.total(f"{name}_sum")
        if not count or seconds is None:
            return None
        bounds: dict[float, float] = {}
        for (own, labels), value in self.samples.items():
            if own == f"{name}_bucket":
                bound = float(dict(labels)["le"])
                bounds[bound] = bounds.get(bound, 0.0) + value
        return {"mean": 1000 * seconds / count} | {f"p{p}": 1000 * _quantile(bounds, p / 100) for p in (50, 90, 95, 99)}

    def savings(self) -> dict[str, Any]:
        """Per saving what was run, what a dense server runs, and dense/run; and every counter of ours that grew."""
        pairs = {title: tuple(map(self.total, names)) for title, names in RUN_AND_DENSE.items()}
        return {
            "pairs": {
                title: {"run": run, "dense": dense, "ratio": dense / run}
                for title, (run, dense) in pairs.items()
                if run and dense
            },
            "counters": self._ours(),
        }

    def _ours(self) -> dict[str, float]:
        counters = {key: value for key, value in self.samples.items() if key[0].startswith(OURS) and value}
        return {
            name + _shown(dict(labels)): value
            for (name, labels), value in sorted(counters.items())
            if name.endswith("_total")
        }


def _shown(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def _quantile(bounds: Mapping[float, float], share: float) -> float:
    """A quantile as by ``histogram_quantile``: linear in a bucket; in the open bucket, the last finite bound."""
    edges = sorted(bounds.items())
    rank = share * edges[-1][1]
    low, below = 0.0, 0.0
    for bound, cumulated in edges:
        if cumulated >= rank and cumulated > below:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (cumulated - below)
        low, below = bound, cumulated
    return low
