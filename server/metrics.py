"""Every metric of ours, in one table, and the object that counts.

In multi-process mode prometheus_client keeps the default registry's metrics in files, which vLLM's ``/metrics`` sums.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_hidrop.plan.plan import FALLBACKS

PREFIX = "vllm_hidrop_"
SERVER_LABELS = ("model_name", "engine", "method")
"""Labels of every series: two as in vLLM's own metrics, and the ``method`` that the request used."""
FIRST_ENGINE = "0"  # counts what is of the whole server, or was reported by no engine
TIMED_MODES = ("pruned", "off", "text", "fallback")
MODES = (*TIMED_MODES, "aborted", "unreported")
REFUSALS = ("options", "media", "key", "header", "body", "grammar", "deadline")
REUSE_OFF = ("disabled", "recurrent", "adaptive", "signal", "cache_dtype", "first_layer", "states")
"""In this order: the server caches no prefixes; layers are recurrent, so that it cannot; the method decides the counts;
its signal needs rows that are cached; the cache rounds K, which scoring reads; the first layer cuts; the server has no
memory for states."""

SECONDS = tuple(float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 2, 3, 5, 7))
"""1 ms to 700 s, five to a decade: from one token of a small model to a queue of minutes."""
STEP_SECONDS = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 2, 5))
RATIOS = tuple(step / 20 for step in range(1, 21))
VLLM_BUCKETS = {
    "time_to_first_token": list(SECONDS),
    "inter_token_latency": list(SECONDS),
    "request_latency": list(SECONDS),
}
"""For vLLM's own histograms, whose buckets for first tokens and requests are too wide to see what pruning saves."""


class Kind(StrEnum):
    """Type of a metric in Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class MetricSpec(NamedTuple):
    """One metric."""

    name: str  # without :data:`PREFIX`; Prometheus shows a counter's with ``_total``
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()  # besides :data:`SERVER_LABELS`
    buckets: tuple[float, ...] | None = None  # None: the stages' first layers
    field: str | None = None  # of the report, where the metric is its sum
    values: tuple[str, ...] = ()  # of the label, unless that is the stage

    @property
    def shown(self) -> str:
        """The name in ``/metrics``, as a counter's or a gauge's samples have it."""
        return PREFIX + self.name + ("_total" if self.kind is Kind.COUNTER else "")


def _counter(
    name: str, text: str, label: str | None = None, values: tuple[str, ...] = (), *, field: str | None = None
) -> MetricSpec:
    return MetricSpec(name, Kind.COUNTER, text, (label,) if label else (), field=field, values=values)


def _histogram(name: str, text: str, buckets: tuple[float, ...] | None, by_mode: bool = False) -> MetricSpec:
    labels, values = (("mode",), TIMED_MODES) if by_mode else ((), ())
    return MetricSpec(name, Kind.HISTOGRAM, text, labels, buckets, values=values)


METRICS = (
    _counter(
        "requests",
        "Sequences that ended, by what pruning did. text: no image; fallback: could not be pruned; "
        "aborted: the client went away; unreported: ended before the engine had reported.",
        "mode",
        MODES,
    ),
    _counter(
        "fallback_requests",
        "Sequences with images that could not be pruned, by reason.",
        "reason",
        tuple(FALLBACKS.values()),
    ),
    _counter("refused_requests", "Requests answered with a 4xx or 504 by us, not by vLLM.", "reason", REFUSALS),
    _counter("vision_tokens_in", "Vision tokens in the prompts of reported sequences.", field="vision_tokens"),
    _counter("vision_tokens_kept", "Vision tokens held, by layer stage.", "stage"),
    _counter("vision_tokens_cached", "Vision tokens in the KV cache after prefill, by layer stage.", "stage"),
    _counter("layer_tokens_run", "Rows that prefills ran, summed over layers.", field="layer_tokens"),
    _counter(
        "layer_tokens_dense",
        "Rows of the same prefills, nothing pruned or reused, summed over layers.",
        field="layer_tokens_dense",
    ),
    _counter("kv_blocks_held", "KV blocks held when a sequence ended.", field="kv_blocks"),
    _counter("kv_blocks_dense", "KV blocks the same sequences hold unpruned on this server.", field="kv_blocks_dense"),
    _counter(
        "kv_blocks_returned",
        "KV blocks allocated for an upper bound and given back after the prefill.",
        field="kv_blocks_returned",
    ),
    _counter("kv_bytes_held", "Bytes of the KV blocks held when a sequence ended, all ranks.", field="kv_bytes"),
    _counter("kv_bytes_dense", "Bytes that stock vLLM holds for the same sequences.", field="kv_bytes_dense"),
    _counter(
        "prefill_flops_run",
        "FLOPs of the prefills as they ran: layers, scoring, LM head, vision tower and projector.",
        field="prefill_flops",
    ),
    _counter(
        "prefill_flops_dense", "FLOPs of the same prefills, nothing pruned or reused.", field="prefill_flops_dense"
    ),
    _counter(
        "prefix_tokens_reused",
        "Prompt tokens taken from the prefix cache instead of being run.",
        field="reused_tokens",
    ),
    _counter("prefix_reuse_off", "Sequences whose images cannot be reused, by reason.", "reuse_off", REUSE_OFF),
    _histogram(
        "keep_ratio", "Vision tokens kept of those in the prompt, mean over layers, per sequence.", buckets=RATIOS
    ),
    _histogram(
        "cut_layer",
        "First layer of a sequence that runs with fewer vision tokens than it had; its buckets are stages.",
        buckets=None,
    ),
    _histogram(
        "exit_layer", "First layer of a sequence that runs without vision tokens; its buckets are stages.", buckets=None
    ),
    _histogram(
        "selection_seconds",
        "Signals and selections in the step of a pruned sequence's prefill; sequences of one step share its time.",
        buckets=STEP_SECONDS,
    ),
    _histogram(
        "time_to_first_token_seconds", "From arrival to the first token, by what pruning did.", SECONDS, by_mode=True
    ),
    _histogram(
        "prefill_seconds",
        "From being scheduled to the first token, by what pruning did: no queue in it.",
        SECONDS,
        by_mode=True,
    ),
    _histogram(
        "time_per_output_token_seconds",
        "Mean time between a sequence's tokens after the first, by what pruning did.",
        SECONDS,
        by_mode=True,
    ),
    MetricSpec("plan_info", Kind.GAUGE, "1; what the server was started with.", ("preset", "positions", "version")),
    MetricSpec("grammars_waiting", Kind.GAUGE, "Grammars being tried, or waiting for it; 0 on an idle server."),
    MetricSpec("stage_first_layer", Kind.GAUGE, "First layer of each of the server's stages.", ("stage",)),
)

TIMES = ("time_to_first_token_seconds", "prefill_seconds", "time_per_output_token_seconds")
OBSERVED = ("keep_ratio", "cut_layer", "exit_layer", "selection_seconds")  # histograms without labels of their own


class Times(NamedTuple):
    """Times of one sequence, in seconds and in the order of :data:`TIMES`; None for a time that does not exist."""

    first_token: float
    prefill: float
    per_output_token: float | None


class _Counts(NamedTuple):
    """Series of one engine, method and mode; ``sums`` pairs them with fields of the report, ``stages`` are pairs."""

    requests: Any
    sums: Sequence[tuple[str, Any]]
    stages: Sequence[tuple[Any, Any]]
    observed: Mapping[str, Any]
    times: Sequence[Any]


class HidropMetrics:
    """Counts finished sequences from the engine's reports.

    The labels of a sequence are the method it used and the engine that ran it; those of refusals, and where no report
    came, the server's own ``method`` and the first of its ``num_engines``. ``info`` are the labels of ``plan_info``.
    """

    def __init__(
        self,
        model_name: str,
        method: str,
        first_layers: Sequence[int],
        info: Mapping[str, str],
        registry: CollectorRegistry = REGISTRY,
        num_engines: int = 1,
    ) -> None:
        self.server = {"model_name": model_name, "engine": FIRST_ENGINE, "method": method}
        self.metrics = {spec.name: _make(spec, first_layers, registry) for spec in METRICS}
        self._num_stages = len(first_layers)
        self._counts: dict[tuple[str, str, str], _Counts] = {}
        self.grammars_wait(0)
        for engine in map(str, range(num_engines)):
            self._show_zeros(engine)
            self._series("plan_info", engine=engine, **info).set(1)
            for stage, layer in enumerate(first_layers):
                self._series("stage_first_layer", engine=engine, stage=str(stage)).set(layer)

    def ended(self, report: Mapping[str, Any] | None, aborted: bool = False, times: Times | None = None) -> None:
        """Count one sequence; an aborted one's tokens count, its times do not.

        ``report`` is None when the engine sent none, ``times`` when vLLM keeps no statistics.
        """
        mode = "aborted" if aborted else report["mode"] if report else "unreported"
        method = report["method"] if report else self.server["method"]
        engine = str(report["engine"]) if report else FIRST_ENGINE
        counts = self._counts_of(engine, method, mode)
        counts.requests.inc()
        if report is None:
            return
        for field, series in counts.sums:
            series.inc(report[field])
        for stage, (kept, cached) in zip(report["stages"], counts.stages, strict=True):
            kept.inc(stage["kept"])
            cached.inc(stage["cached"])
        for name, value in _observed(report).items():
            if value is not None:
                counts.observed[name].observe(value)
        if report["reuse_off"] is not None:
            self._add("prefix_reuse_off", engine=engine, method=method, reuse_off=report["reuse_off"])
        if report["fallback"] is not None:
            self._add("fallback_requests", engine=engine, method=method, reason=FALLBACKS[report["fallback"]])
        if times is not None and not aborted:
            for series, value in zip(counts.times, times, strict=True):
                if value is not None:
                    series.observe(value)

    def refused(self, reason: str) -> None:
        """Count one request that we answered with a 4xx or 504."""
        self._add("refused_requests", reason=reason)

    def grammars_wait(self, count: int) -> None:
        """Show how many grammars have no verdict yet."""
        self._series("grammars_waiting").set(count)

    def _counts_of(self, engine: str, method: str, mode: str) -> "_Counts":
        """The series of one engine, method and mode, looked up once: that takes longer than counting."""
        found = self._counts.get((engine, method, mode))
        if found is None:
            series = partial(self._series, engine=engine, method=method)
            stages = [str(index) for index in range(self._num_stages)]
            found = self._counts[engine, method, mode] = _Counts(
                series("requests", mode=mode),
                [(spec.field, series(spec.name)) for spec in METRICS if spec.field],
                [(series("vision_tokens_kept", stage=i), series("vision_tokens_cached", stage=i)) for i in stages],
                {name: series(name) for name in OBSERVED},
                [series(name, mode=mode) for name in TIMES] if mode in TIMED_MODES else [],
            )
        return found

    def _add(self, name: str, **labels: str) -> None:
        self._series(name, **labels).inc()

    def _series(self, name: str, **labels: str) -> Any:
        return self.metrics[name].labels(**{**self.server, **labels})

    def _show_zeros(self, engine: str) -> None:
        """Create every series of an engine at the start: ``rate()`` does not see the first value of a new one."""
        stages = tuple(str(index) for index in range(self._num_stages))
        for spec in METRICS:
            if spec.kind is Kind.GAUGE:
                continue
            if not spec.labels:
                self._series(spec.name, engine=engine)
            for label in spec.labels:
                for value in stages if label == "stage" else spec.values:
                    self._series(spec.name, engine=engine, **{label: value})


def _make(spec: MetricSpec, first_layers: Sequence[int], registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, labels = PREFIX + spec.name, (*SERVER_LABELS, *spec.labels)
    if spec.kind is Kind.COUNTER:
        return Counter(name, spec.help, labels, registry=registry)
    if spec.kind is Kind.GAUGE:
        return Gauge(name, spec.help, labels, registry=registry, multiprocess_mode="max")
    buckets = tuple(first_layers) if spec.buckets is None else spec.buckets
    return Histogram(name, spec.help, labels, buckets=buckets, registry=registry)


def _observed(report: Mapping[str, Any]) -> dict[str, float | None]:
    """What one report adds to :data:`OBSERVED`; None adds nothing."""
    is_pruned = report["mode"] == "pruned"
    return {
        "keep_ratio": _keep_ratio(report),
        "cut_layer": report["cut_layer"],
        "exit_layer": report["exit_layer"],
        "selection_seconds": report["selection_ms"] / 1000 if is_pruned else None,
    }


def _keep_ratio(report: Mapping[str, Any]) -> float | None:
    """Share of the vision tokens that is kept, mean over layers; None without any vision token."""
    layers = [(stage["end_layer"] - stage["first_layer"], stage["kept"]) for stage in report["stages"]]
    num_tokens = report["vision_tokens"] * sum(count for count, _ in layers)
    return sum(count * kept for count, kept in layers) / num_tokens if num_tokens else None
