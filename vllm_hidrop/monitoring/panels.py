"""What a dashboard is made of, and the PromQL of its panels; ``$...`` in a query are Grafana's variables."""

from dataclasses import dataclass
from enum import StrEnum

MODEL = 'model_name=~"$model_name"'
INTERVAL = "$__rate_interval"


class Unit(StrEnum):
    """Units by Grafana's names."""

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
    """One chart: lines over time or, with ``is_stat``, numbers over the whole range."""

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

    @classmethod
    def of(cls, title: str, *panels: Panel) -> "Row":
        """A row of these panels, in order."""
        return cls(title, panels)


@dataclass(frozen=True)
class Dashboard:
    """One dashboard; ``uid`` is also the name of its file."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, in order."""
        return tuple(panel for row in self.rows for panel in row.panels)


def fill(expr: str, interval: str, model_name: str = ".*") -> str:
    """Replace Grafana's variables as Prometheus needs it, both ranges by ``interval``."""
    values = {"$model_name": model_name, INTERVAL: interval, "$__range": interval}
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Growth per second, summed over everything but ``by``."""
    labels = ", ".join(filter(None, (MODEL, where)))
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}[{INTERVAL}]))"


def increase(metric: str) -> str:
    """Growth over the whole range, summed over everything."""
    return f"sum(increase({metric}{{{MODEL}}}[$__range]))"


def saved(what: str) -> str:
    """Share of a dense server's amount that was not needed, over the whole range."""
    held = "held" if what.startswith("kv") else "run"
    return f"1 - {increase(f'vllm_hidrop_{what}_{held}_total')} / {increase(f'vllm_hidrop_{what}_dense_total')}"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    """Mean of a histogram's observations over the rate interval."""
    return f"{rate(histogram + '_sum', by, where)} / {rate(histogram + '_count', by, where)}"


def by(metric: str, label: str) -> tuple[Query, ...]:
    """Growth per second, one line for each value of a label."""
    return (Query(rate(metric, label), f"{{{{{label}}}}}"),)


def quantiles(histogram: str) -> tuple[Query, ...]:
    """Median, 95th and 99th percentile, interpolated in the buckets."""
    buckets = rate(f"{histogram}_bucket", "le")
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99))


def median_by_mode(histogram: str) -> tuple[Query, ...]:
    """The median, one line for each mode (pruned, off, ...)."""
    return (Query(f"histogram_quantile(0.5, {rate(histogram + '_bucket', 'le, mode')})", "{{mode}}"),)


def run_and_dense(what: str, verb: str) -> tuple[Query, ...]:
    """What was done per second, and what a dense server would do; ``verb`` is the counter's: held, run."""
    return tuple(Query(rate(f"vllm_hidrop_{what}_{name}_total"), name) for name in (verb, "dense"))


def up_to_layer(histogram: str) -> tuple[Query, ...]:
    """Share of sequences for which a layer number is at most each of the stages' first layers."""
    part, whole = rate(f"{histogram}_bucket", "le"), rate(f"{histogram}_count")
    return (Query(f"{part} / ignoring (le) group_left {whole}", "<= {{le}}"),)


def by_stage(what: str) -> tuple[Query, ...]:
    """Share of the prompts' vision tokens that each stage ``what``: kept, cached."""
    part, whole = rate(f"vllm_hidrop_vision_tokens_{what}_total", "stage"), rate("vllm_hidrop_vision_tokens_in_total")
    return (Query(f"{part} / ignoring (stage) group_left {whole}", "stage {{stage}}"),)


def speed_up(histogram: str) -> str:
    """Mean over off requests divided by the mean over pruned ones."""
    off, pruned = (mean(histogram, where=f'mode="{mode}"') for mode in ("off", "pruned"))
    return f"({off}) / ({pruned})"
