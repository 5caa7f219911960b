"""The dashboards as data: every panel and its PromQL, for Grafana, for the tests and for the picture in the docs.

Knows names of metrics only. In a query, ``$model_name``, ``$__rate_interval`` and ``$__range`` are Grafana's variables.
"""

from dataclasses import dataclass
from enum import StrEnum

MODEL = 'model_name=~"$model_name"'
INTERVAL = "$__rate_interval"


class Unit(StrEnum):
    """Grafana's names."""

    COUNT = "short"
    RATE = "cps"
    REQUESTS = "reqps"
    SECONDS = "s"
    BYTES = "bytes"
    BYTE_RATE = "Bps"
    FLOPS = "flops"
    SHARE = "percentunit"
    TIMES = "suffix:x"


@dataclass(frozen=True)
class Query:
    """One expression; ``legend`` may name labels as ``{{label}}``."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture; ``is_stat`` shows one number over the whole range instead of lines."""

    title: str
    description: str
    unit: Unit
    queries: tuple[Query, ...]
    is_stat: bool = False


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard; ``uid`` is its file's name, too."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All of them, in order."""
        return tuple(panel for row in self.rows for panel in row.panels)


def fill(expr: str, interval: str, model_name: str = ".*") -> str:
    """The expression as Prometheus takes it: Grafana's variables replaced, both ranges by ``interval``."""
    values = {"$model_name": model_name, INTERVAL: interval, "$__range": interval}
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr


def _rate(metric: str, by: str = "", where: str = "") -> str:
    """Growth per second, summed over everything but ``by``."""
    labels = ", ".join(filter(None, (MODEL, where)))
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}[{INTERVAL}]))"


def _increase(metric: str) -> str:
    return f"sum(increase({metric}{{{MODEL}}}[$__range]))"


def _saved(what: str) -> str:
    """Share of a dense amount that was not needed, over the whole range."""
    held = "held" if what.startswith("kv") else "run"
    return f"1 - {_increase(f'vllm_hidrop_{what}_{held}_total')} / {_increase(f'vllm_hidrop_{what}_dense_total')}"


def _mean(histogram: str, by: str = "", where: str = "") -> str:
    return f"{_rate(histogram + '_sum', by, where)} / {_rate(histogram + '_count', by, where)}"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    rate = _rate(f"{histogram}_bucket", "le")
    return tuple(Query(f"histogram_quantile({q}, {rate})", f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99))


def _median_by_mode(histogram: str) -> tuple[Query, ...]:
    return (Query(f"histogram_quantile(0.5, {_rate(histogram + '_bucket', 'le, mode')})", "{{mode}}"),)


def _run_and_dense(what: str, verb: str) -> tuple[Query, ...]:
    return tuple(Query(_rate(f"vllm_hidrop_{what}_{name}_total"), name) for name in (verb, "dense"))


def _up_to_layer(histogram: str) -> tuple[Query, ...]:
    """Share of sequences for which a layer number is at most each of the stages' first layers."""
    part, whole = _rate(f"{histogram}_bucket", "le"), _rate(f"{histogram}_count")
    return (Query(f"{part} / ignoring (le) group_left {whole}", "<= {{le}}"),)


def _by_stage(what: str) -> tuple[Query, ...]:
    part, whole = _rate(f"vllm_hidrop_vision_tokens_{what}_total", "stage"), _rate("vllm_hidrop_vision_tokens_in_total")
    return (Query(f"{part} / ignoring (stage) group_left {whole}", "stage {{stage}}"),)


def _speed_up(histogram: str) -> str:
    off, pruned = (_mean(histogram, where=f'mode="{mode}"') for mode in ("off", "pruned"))
    return f"({off}) / ({pruned})"


TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests by outcome",
            "Sequences that ended, by what pruning did.",
            Unit.REQUESTS,
            (Query(_rate("vllm_hidrop_requests_total", "mode"), "{{mode}}"),),
        ),
        Panel(
            "Tokens",
            "Prompt tokens as clients count them, and generated tokens, per second.",
            Unit.RATE,
            (
                Query(_rate("vllm:prompt_tokens_total"), "prompt"),
                Query(_rate("vllm:generation_tokens_total"), "generated"),
            ),
        ),
        Panel(
            "Queue",
            "Requests running, and waiting for a place in a step or for KV blocks.",
            Unit.COUNT,
            (
                Query(f"sum(vllm:num_requests_running{{{MODEL}}})", "running"),
                Query(f"sum(vllm:num_requests_waiting{{{MODEL}}})", "waiting"),
            ),
        ),
    ),
)
LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "From arrival to the first token, queue included.",
            Unit.SECONDS,
            _quantiles("vllm:time_to_first_token_seconds"),
        ),
        Panel(
            "Inter-token latency",
            "Between two tokens of a sequence.",
            Unit.SECONDS,
            _quantiles("vllm:inter_token_latency_seconds"),
        ),
        Panel(
            "Time in the queue",
            "From arrival in the engine until first scheduled.",
            Unit.SECONDS,
            _quantiles("vllm:request_queue_time_seconds"),
        ),
        Panel(
            "Whole request",
            "From arrival to the last token.",
            Unit.SECONDS,
            _quantiles("vllm:e2e_request_latency_seconds"),
        ),
    ),
)
ERRORS = Row(
    "Errors",
    (
        Panel(
            "Answers by HTTP status",
            "Every route of the server; a disconnected client's is the status it would have got.",
            Unit.REQUESTS,
            (Query(f"sum by (status) (rate(http_requests_total[{INTERVAL}]))", "{{status}}"),),
        ),
        Panel(
            "Refused by us",
            "4xx and 504 by reason; what vLLM itself refuses is under HTTP status only.",
            Unit.REQUESTS,
            (Query(_rate("vllm_hidrop_refused_requests_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Grammars being tried",
            "Those of structured outputs without a verdict yet: an idle server has none.",
            Unit.COUNT,
            (Query(f"max(vllm_hidrop_grammars_waiting{{{MODEL}}})", "waiting"),),
        ),
        Panel(
            "Not pruned although asked to",
            "Sequences with images that ran dense, by reason.",
            Unit.REQUESTS,
            (Query(_rate("vllm_hidrop_fallback_requests_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Preemptions",
            "Requests thrown out of the KV cache to be computed again: the pool is too small.",
            Unit.RATE,
            (Query(_rate("vllm:num_preemptions_total"), "preemptions"),),
        ),
    ),
)
KV_CACHE = Row(
    "KV cache",
    (
        Panel(
            "KV cache in use",
            "Share of the pool's blocks.",
            Unit.SHARE,
            (Query(f"max(vllm:kv_cache_usage_perc{{{MODEL}}})", "in use"),),
        ),
        Panel(
            "KV bytes per sequence",
            "Held when a sequence ended, and what stock vLLM would hold.",
            Unit.BYTES,
            tuple(
                Query(f"{_rate(f'vllm_hidrop_kv_bytes_{name}_total')} / {_rate('vllm_hidrop_requests_total')}", name)
                for name in ("held", "dense")
            ),
        ),
        Panel(
            "Prefix cache",
            "Prompt tokens per second that were reused instead of run.",
            Unit.RATE,
            (Query(_rate("vllm_hidrop_prefix_tokens_reused_total"), "reused"),),
        ),
        Panel(
            "Images that cannot be reused",
            "Sequences by reason; GET /hidrop and the README say what each means.",
            Unit.REQUESTS,
            (Query(_rate("vllm_hidrop_prefix_reuse_off_total", "reuse_off"), "{{reuse_off}}"),),
        ),
    ),
)
OVERVIEW = Dashboard(
    "hidrop-overview",
    "hidrop: overview",
    "A server of vllm_hidrop: traffic, latency, queue, errors, KV cache.",
    (TRAFFIC, LATENCY, ERRORS, KV_CACHE),
)

TOTALS = Row(
    "Saved over the whole range",
    (
        Panel(
            "Vision tokens kept",
            "Of those in the prompts, mean over layers and sequences with images.",
            Unit.SHARE,
            (
                Query(
                    f"{_increase('vllm_hidrop_keep_ratio_sum')} / {_increase('vllm_hidrop_keep_ratio_count')}", "kept"
                ),
            ),
            is_stat=True,
        ),
        Panel(
            "KV bytes saved",
            "Against stock vLLM, over all sequences, text and off included.",
            Unit.SHARE,
            (Query(_saved("kv_bytes"), "saved"),),
            is_stat=True,
        ),
        Panel(
            "Prefill FLOPs saved",
            "Against the same prompts with nothing pruned or reused, vision tower and projector included.",
            Unit.SHARE,
            (Query(_saved("prefill_flops"), "saved"),),
            is_stat=True,
        ),
        Panel(
            "Served with",
            "Method and preset.",
            Unit.COUNT,
            (Query(f"max by (method, preset) (vllm_hidrop_plan_info{{{MODEL}}})", "{{method}} {{preset}}"),),
            is_stat=True,
        ),
    ),
)
TOKENS = Row(
    "Vision tokens",
    (
        Panel(
            "Kept per stage",
            "Share of the prompts' vision tokens that each stage ran with.",
            Unit.SHARE,
            _by_stage("kept"),
        ),
        Panel(
            "Cached per stage",
            "Share of the prompts' vision tokens in each stage's KV cache after prefill.",
            Unit.SHARE,
            _by_stage("cached"),
        ),
        Panel(
            "First layer of each stage",
            "What the numbers of stages mean on this server.",
            Unit.COUNT,
            (Query(f"max by (stage) (vllm_hidrop_stage_first_layer{{{MODEL}}})", "stage {{stage}}"),),
            is_stat=True,
        ),
        Panel(
            "Cut by layer",
            "Share of sequences with a cut that have fewer vision tokens from this layer on, or earlier.",
            Unit.SHARE,
            _up_to_layer("vllm_hidrop_cut_layer"),
        ),
        Panel(
            "Exit by layer",
            "Share of sequences with an exit that have no vision tokens from this layer on, or earlier.",
            Unit.SHARE,
            _up_to_layer("vllm_hidrop_exit_layer"),
        ),
    ),
)
MEMORY = Row(
    "KV cache",
    (
        Panel(
            "KV bytes",
            "Per second of sequences that ended: held, and what stock vLLM would hold.",
            Unit.BYTE_RATE,
            _run_and_dense("kv_bytes", "held"),
        ),
        Panel(
            "KV blocks",
            "Per second: held; unpruned on this server; taken for an upper bound and given back.",
            Unit.RATE,
            (
                *_run_and_dense("kv_blocks", "held"),
                Query(_rate("vllm_hidrop_kv_blocks_returned_total"), "returned"),
            ),
        ),
    ),
)
COMPUTE = Row(
    "Compute",
    (
        Panel(
            "Prefill FLOPs",
            "Per second: run, and without pruning or reuse.",
            Unit.FLOPS,
            _run_and_dense("prefill_flops", "run"),
        ),
        Panel(
            "Rows of prefills, summed over layers",
            "Per second: run, and without pruning or reuse.",
            Unit.RATE,
            _run_and_dense("layer_tokens", "run"),
        ),
        Panel(
            "Selection",
            "Signals and selections in the step of a pruned prefill.",
            Unit.SECONDS,
            _quantiles("vllm_hidrop_selection_seconds"),
        ),
    ),
)
SPEED = Row(
    "Speed against off",
    (
        Panel(
            "Speed-up against off",
            "Mean times of off requests over those of pruned ones. A fair figure only where both ask the same.",
            Unit.TIMES,
            (
                Query(_speed_up("vllm_hidrop_prefill_seconds"), "prefill"),
                Query(_speed_up("vllm_hidrop_time_to_first_token_seconds"), "first token"),
                Query(_speed_up("vllm_hidrop_time_per_output_token_seconds"), "output token"),
            ),
        ),
        Panel(
            "Prefill, median",
            "From being scheduled to the first token, by what pruning did.",
            Unit.SECONDS,
            _median_by_mode("vllm_hidrop_prefill_seconds"),
        ),
        Panel(
            "Time to first token, median",
            "From arrival to the first token, by what pruning did.",
            Unit.SECONDS,
            _median_by_mode("vllm_hidrop_time_to_first_token_seconds"),
        ),
        Panel(
            "Time per output token, median",
            "Mean time between a sequence's tokens after the first, by what pruning did.",
            Unit.SECONDS,
            _median_by_mode("vllm_hidrop_time_per_output_token_seconds"),
        ),
    ),
)
SAVINGS = Dashboard(
    "hidrop-savings",
    "hidrop: savings",
    "What pruning saves: vision tokens, KV cache, FLOPs, time against off.",
    (TOTALS, TOKENS, MEMORY, COMPUTE, SPEED),
)
DASHBOARDS = (SAVINGS, OVERVIEW)
