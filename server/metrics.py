"""Every metric of ours, in one list, and the object that counts.

Knows prometheus_client and the report of a finished request; not vLLM. Counters of the process's default registry work
in multi-process mode as well: prometheus_client then keeps them in files that vLLM's ``/metrics`` adds up.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram


class CounterSpec(NamedTuple):
    """One counter; Prometheus shows its name with ``_total``."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


SERVER_LABELS = ("model_name", "method")
MODES = ("pruned", "off", "text", "fallback", "aborted", "unreported")
REFUSALS = ("options", "media")
REUSE_OFF = ("disabled", "adaptive", "cache_dtype", "first_layer", "states")
"""The server caches no prefixes; the method decides the counts; the cache rounds K, which scoring reads; the first
layer cuts; the server has no memory for states."""

COUNTERS = (
    CounterSpec(
        "vllm_hidrop_requests",
        "Sequences that ended, by what pruning did. aborted: the client went away; unreported: it ended before the "
        "engine had reported.",
        ("mode",),
    ),
    CounterSpec("vllm_hidrop_vision_tokens_in", "Vision tokens in the prompts of reported sequences."),
    CounterSpec("vllm_hidrop_vision_tokens_kept", "Vision tokens held, by layer stage.", ("stage",)),
    CounterSpec(
        "vllm_hidrop_vision_tokens_cached", "Vision tokens in the KV cache after prefill, by layer stage.", ("stage",)
    ),
    CounterSpec("vllm_hidrop_layer_tokens_run", "Rows that prefills ran, summed over layers."),
    CounterSpec(
        "vllm_hidrop_layer_tokens_dense", "Rows that the same prefills have without pruning, summed over layers."
    ),
    CounterSpec("vllm_hidrop_kv_blocks_held", "KV blocks held when a sequence ended."),
    CounterSpec(
        "vllm_hidrop_kv_blocks_returned", "KV blocks allocated for an upper bound and given back after the prefill."
    ),
    CounterSpec("vllm_hidrop_kv_blocks_dense", "KV blocks the same sequences hold without pruning."),
    CounterSpec("vllm_hidrop_prefix_tokens_reused", "Prompt tokens taken from the prefix cache instead of being run."),
    CounterSpec("vllm_hidrop_prefix_reuse_off", "Sequences whose images cannot be reused, by reason.", ("reuse_off",)),
    CounterSpec("vllm_hidrop_refused_requests", "Requests answered with a 4xx by us, not by vLLM.", ("reason",)),
)


HISTOGRAMS = {
    "cut_layer": "First layer of a sequence that runs with fewer vision tokens than it had; its buckets are stages.",
    "exit_layer": "First layer of a sequence that runs without vision tokens; its buckets are stages.",
}


class HidropMetrics:
    """Counts finished sequences from the engine's reports.

    Args:
        model_name: label.
        method: the server's own; the label of a sequence is the method it used.
        first_layers: of the server's stages.
        registry: where the metrics live.
    """

    def __init__(
        self, model_name: str, method: str, first_layers: Sequence[int], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self.server = {"model_name": model_name, "method": method}
        self.counters = {
            spec.name.removeprefix("vllm_hidrop_"): Counter(
                spec.name, spec.help, (*SERVER_LABELS, *spec.labels), registry=registry
            )
            for spec in COUNTERS
        }
        self.histograms = {
            name: Histogram(f"vllm_hidrop_{name}", text, SERVER_LABELS, buckets=tuple(first_layers), registry=registry)
            for name, text in HISTOGRAMS.items()
        }
        self._show_zeros(len(first_layers))

    def ended(self, report: Mapping[str, Any] | None, aborted: bool = False) -> None:
        """Count one sequence; ``report`` is the engine's, None when it sent none."""
        mode = "aborted" if aborted else report["mode"] if report else "unreported"
        method = report["method"] if report else self.server["method"]
        self._add("requests", 1, method=method, mode=mode)
        if report is None:
            return
        sums = {
            "vision_tokens_in": "vision_tokens",
            "layer_tokens_run": "layer_tokens",
            "layer_tokens_dense": "layer_tokens_dense",
            "kv_blocks_held": "kv_blocks",
            "kv_blocks_returned": "kv_blocks_returned",
            "kv_blocks_dense": "kv_blocks_dense",
            "prefix_tokens_reused": "reused_tokens",
        }
        for name, field in sums.items():
            self._add(name, report[field], method=method)
        if report["reuse_off"] is not None:
            self._add("prefix_reuse_off", 1, method=method, reuse_off=report["reuse_off"])
        for index, stage in enumerate(report["stages"]):
            self._add("vision_tokens_kept", stage["kept"], method=method, stage=str(index))
            self._add("vision_tokens_cached", stage["cached"], method=method, stage=str(index))
        for name, histogram in self.histograms.items():
            if report[name] is not None:
                histogram.labels(**{**self.server, "method": method}).observe(report[name])

    def refused(self, reason: str) -> None:
        """Count one request that we answered with a 4xx."""
        self._add("refused_requests", 1, reason=reason)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        self.counters[name].labels(**{**self.server, **labels}).inc(amount)

    def _show_zeros(self, num_stages: int) -> None:
        """Let every series exist from the start: ``rate()`` does not see the first value of a new one."""
        values = {
            "mode": MODES,
            "reason": REFUSALS,
            "reuse_off": REUSE_OFF,
            "stage": tuple(str(index) for index in range(num_stages)),
        }
        for histogram in self.histograms.values():
            histogram.labels(**self.server)
        for spec in COUNTERS:
            name = spec.name.removeprefix("vllm_hidrop_")
            for label in spec.labels:
                for value in values[label]:
                    self._add(name, 0, **{label: value})
            if not spec.labels:
                self._add(name, 0)
