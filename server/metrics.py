"""Every metric of ours, in one list, and the object that counts.

Knows prometheus_client and the report of a finished request; not vLLM. Counters of the process's default registry work
in multi-process mode as well: prometheus_client then keeps them in files that vLLM's ``/metrics`` adds up.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter


class CounterSpec(NamedTuple):
    """One counter; Prometheus shows its name with ``_total``."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


SERVER_LABELS = ("model_name", "method")
MODES = ("pruned", "off", "text", "fallback", "aborted", "unreported")
REFUSALS = ("options", "media")

COUNTERS = (
    CounterSpec(
        "vllm_hidrop_requests",
        "Sequences that ended, by what pruning did. aborted: the client went away; unreported: it ended before the "
        "engine had reported.",
        ("mode",),
    ),
    CounterSpec("vllm_hidrop_vision_tokens_in", "Vision tokens in the prompts of reported sequences."),
    CounterSpec("vllm_hidrop_vision_tokens_kept", "Vision tokens held, by layer stage.", ("stage",)),
    CounterSpec("vllm_hidrop_layer_tokens_run", "Rows that prefills ran, summed over layers."),
    CounterSpec(
        "vllm_hidrop_layer_tokens_dense", "Rows that the same prefills have without pruning, summed over layers."
    ),
    CounterSpec("vllm_hidrop_kv_blocks_held", "KV blocks held when a sequence ended."),
    CounterSpec("vllm_hidrop_kv_blocks_dense", "KV blocks the same sequences hold without pruning."),
    CounterSpec("vllm_hidrop_refused_requests", "Requests answered with a 4xx by us, not by vLLM.", ("reason",)),
)


class HidropMetrics:
    """Counts finished sequences from the engine's reports."""

    def __init__(self, model_name: str, method: str, num_stages: int, registry: CollectorRegistry = REGISTRY) -> None:
        self.server = {"model_name": model_name, "method": method}
        self.counters = {
            spec.name.removeprefix("vllm_hidrop_"): Counter(
                spec.name, spec.help, (*SERVER_LABELS, *spec.labels), registry=registry
            )
            for spec in COUNTERS
        }
        self._show_zeros(num_stages)

    def ended(self, report: Mapping[str, Any] | None, aborted: bool = False) -> None:
        """Count one sequence; ``report`` is the engine's, None when it sent none."""
        mode = "aborted" if aborted else report["mode"] if report else "unreported"
        self._add("requests", 1, mode=mode)
        if report is None:
            return
        self._add("vision_tokens_in", report["vision_tokens"])
        self._add("layer_tokens_run", report["layer_tokens"])
        self._add("layer_tokens_dense", report["layer_tokens_dense"])
        self._add("kv_blocks_held", report["kv_blocks"])
        self._add("kv_blocks_dense", report["kv_blocks_dense"])
        for index, stage in enumerate(report["stages"]):
            self._add("vision_tokens_kept", stage["kept"], stage=str(index))

    def refused(self, reason: str) -> None:
        """Count one request that we answered with a 4xx."""
        self._add("refused_requests", 1, reason=reason)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        self.counters[name].labels(**self.server, **labels).inc(amount)

    def _show_zeros(self, num_stages: int) -> None:
        """Let every series exist from the start: ``rate()`` does not see the first value of a new one."""
        values = {
            "mode": MODES,
            "reason": REFUSALS,
            "stage": tuple(str(index) for index in range(num_stages)),
        }
        for spec in COUNTERS:
            name = spec.name.removeprefix("vllm_hidrop_")
            for label in spec.labels:
                for value in values[label]:
                    self._add(name, 0, **{label: value})
            if not spec.labels:
                self._add(name, 0)
