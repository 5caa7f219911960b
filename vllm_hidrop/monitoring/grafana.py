"""``python -m vllm_hidrop.monitoring.grafana`` writes deploy/grafana, the dashboards as Grafana's JSON."""

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

from vllm_hidrop.monitoring.dashboards import DASHBOARDS
from vllm_hidrop.monitoring.panels import Dashboard, Panel

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24  # columns of Grafana's grid


def to_json(dashboard: Dashboard) -> str:
    """The text of a dashboard's file."""
    builder = (
        builders.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags(["vllm_hidrop"])
        .refresh("10s")
        .time("now-15m", "now")
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            builders.QueryVariable("model_name")
            .label("Model")
            .datasource(SOURCE)
            .query("label_values(vllm_hidrop_requests_total, model_name)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
        )
    )
    for row in dashboard.rows:
        builder.with_row(builders.Row(row.title))
        for panel in row.panels:
            builder.with_panel(_panel(panel, WIDTH // min(len(row.panels), 4)))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _panel(panel: Panel, width: int) -> stat.Panel | timeseries.Panel:
    builder: stat.Panel | timeseries.Panel
    if panel.is_stat:
        builder = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        legend = common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM).calcs(["lastNotNull"])
        builder = timeseries.Panel().fill_opacity(8).min(0).legend(legend)
    builder.title(panel.title).description(panel.description).unit(str(panel.unit)).datasource(SOURCE)
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
        builder.with_target(target.instant() if panel.is_stat else target.range())
    return builder.height(8).span(width)


def main() -> int:
    """Write one file per dashboard."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.uid}.json").write_text(to_json(dashboard), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
