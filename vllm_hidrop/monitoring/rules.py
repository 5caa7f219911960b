"""Alert and recording rules; ``python -m vllm_hidrop.monitoring.rules`` writes rule file and operator manifest."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FILE = DEPLOY / "prometheus" / "hidrop.rules.yml"
MANIFEST = DEPLOY / "kubernetes" / "base" / "prometheus-rule.yaml"
RUNBOOK = "docs/runbook.md"
HEADER = "# Written by `python -m vllm_hidrop.monitoring.rules`; docs/runbook.md has an answer to every alert.\n"


@dataclass(frozen=True)
class Recording:
    """A value that Prometheus keeps under a name of its own, per model."""

    name: str
    expr: str


@dataclass(frozen=True)
class Alert:
    """Fires when ``value`` ``is_bad`` for as long as ``lasting``."""

    name: str
    value: str  # exists whenever the server runs
    is_bad: str
    lasting: str
    severity: str  # page: someone is needed now; ticket: today
    summary: str

    @property
    def expr(self) -> str:
        """The expression that Prometheus evaluates."""
        return f"{self.value} {self.is_bad}"


def _rate(metric: str, where: str = "") -> str:
    return f"sum by (model_name) (rate({metric}{where and '{' + where + '}'}[5m]))"


def _ratio(name: str, part: str, whole: str) -> Recording:
    return Recording(f"hidrop:{name}:ratio_rate5m", f"{_rate(part)} / {_rate(whole)}")


RECORDINGS = (
    _ratio("vision_tokens_kept", "vllm_hidrop_keep_ratio_sum", "vllm_hidrop_keep_ratio_count"),
    _ratio("kv_bytes_held", "vllm_hidrop_kv_bytes_held_total", "vllm_hidrop_kv_bytes_dense_total"),
    _ratio("prefill_flops_run", "vllm_hidrop_prefill_flops_run_total", "vllm_hidrop_prefill_flops_dense_total"),
    _ratio("layer_tokens_run", "vllm_hidrop_layer_tokens_run_total", "vllm_hidrop_layer_tokens_dense_total"),
    Recording(
        "hidrop:prefill_seconds:mean_rate5m",
        "sum by (model_name, mode) (rate(vllm_hidrop_prefill_seconds_sum[5m]))"
        " / sum by (model_name, mode) (rate(vllm_hidrop_prefill_seconds_count[5m]))",
    ),
    Recording("hidrop:requests:rate5m", "sum by (model_name, mode) (rate(vllm_hidrop_requests_total[5m]))"),
    Recording(
        "hidrop:time_to_first_token_seconds:p95_rate5m",
        "histogram_quantile(0.95, sum by (model_name, le) (rate(vllm:time_to_first_token_seconds_bucket[5m])))",
    ),
)
PRUNED = _rate("vllm_hidrop_requests_total", 'mode="pruned"')
ALERTS = (
    Alert("HidropServerDown", 'up{job="hidrop"}', "== 0", "1m", "page", "Prometheus cannot scrape the server."),
    Alert(
        "HidropServerErrors",
        '(sum by (job) (rate(http_requests_total{job="hidrop", status="5xx"}[5m]))'
        ' or 0 * sum by (job) (rate(http_requests_total{job="hidrop"}[5m])))'
        ' / sum by (job) (rate(http_requests_total{job="hidrop"}[5m]))',
        "> 0.01",
        "5m",
        "page",
        "More than 1 % of answers are server errors.",
    ),
    Alert(
        "HidropUnreported",
        _rate("vllm_hidrop_requests_total", 'mode="unreported"'),
        "> 0",
        "10m",
        "ticket",
        "Sequences end without the engine having reported: metrics and responses miss them.",
    ),
    Alert(
        "HidropQueueGrows",
        "min_over_time(vllm:num_requests_waiting[5m])",
        "> 16",
        "5m",
        "page",
        "Requests wait all the time: more arrive than the server finishes.",
    ),
    Alert(
        "HidropSlowFirstToken",
        "hidrop:time_to_first_token_seconds:p95_rate5m",
        "> 10",
        "10m",
        "ticket",
        "One request in twenty waits more than ten seconds for its first token.",
    ),
    Alert(
        "HidropKVCacheFull",
        "min_over_time(vllm:kv_cache_usage_perc[5m])",
        "> 0.95",
        "5m",
        "ticket",
        "The KV cache has been full for minutes: requests wait for blocks.",
    ),
    Alert(
        "HidropPreempting",
        _rate("vllm:num_preemptions_total"),
        "> 0.1",
        "10m",
        "ticket",
        "Requests are thrown out of the KV cache and computed again.",
    ),
    Alert(
        "HidropRefusing",
        f"{_rate('vllm_hidrop_refused_requests_total')} / "
        f"({_rate('vllm_hidrop_requests_total')} + {_rate('vllm_hidrop_refused_requests_total')})",
        "> 0.2",
        "15m",
        "ticket",
        "One request in five is refused for its options or media.",
    ),
    Alert(
        "HidropFallingBack",
        f"{_rate('vllm_hidrop_fallback_requests_total')} / {_rate('vllm_hidrop_keep_ratio_count')}",
        "> 0.1",
        "15m",
        "ticket",
        "One sequence with images in ten is not pruned although it should be.",
    ),
    Alert(
        "HidropSavesLittle",
        f"(hidrop:prefill_flops_run:ratio_rate5m and on (model_name) {PRUNED} > 0.01)",
        "> 0.9",
        "30m",
        "ticket",
        "Requests are pruned, and still nine tenths of the dense prefill is computed.",
    ),
)


def groups() -> dict[str, Any]:
    """The content of a rule file."""
    recorded = [{"record": each.name, "expr": each.expr} for each in RECORDINGS]
    alerts: list[dict[str, Any]] = [
        {
            "alert": each.name,
            "expr": each.expr,
            "for": each.lasting,
            "labels": {"severity": each.severity},
            "annotations": {"summary": each.summary, "runbook": f"{RUNBOOK}#{each.name.lower()}"},
        }
        for each in ALERTS
    ]
    return {"groups": [{"name": "hidrop", "rules": recorded}, {"name": "hidrop-alerts", "rules": alerts}]}


def manifest() -> dict[str, Any]:
    """The same rules as a manifest for the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "hidrop", "labels": {"app.kubernetes.io/name": "hidrop"}},
        "spec": groups(),
    }


def files() -> dict[Path, str]:
    """Every file that is written, and its text."""
    found = {FILE: groups(), MANIFEST: manifest()}
    return {file: HEADER + yaml.safe_dump(each, sort_keys=False, width=110) for file, each in found.items()}


def main() -> int:
    """Write both files."""
    for file, text in files().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
