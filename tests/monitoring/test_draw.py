"""The picture of the dashboards, from answers that Prometheus could have given."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_hidrop.monitoring.dashboards import DASHBOARDS
from vllm_hidrop.monitoring.draw import draw, height_inches
from vllm_hidrop.monitoring.panels import Panel
from vllm_hidrop.monitoring.prometheus import Series

QUERIES = [query for dashboard in DASHBOARDS for panel in dashboard.panels for query in panel.queries]
LABELS = {"mode": "off", "stage": "3", "method": "hidrop", "preset": "tok64"}


def picture(file: Path, value: float) -> np.ndarray:
    points = tuple((1e9 + second, value) for second in range(9))
    draw(DASHBOARDS, {query.expr: [Series(LABELS, points)] for query in QUERIES}, file)
    return np.asarray(Image.open(file).convert("L"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return picture(tmp_path_factory.mktemp("empty") / "a.png", math.nan)


def test_every_panel_has_its_place(empty: np.ndarray, tmp_path: Path) -> None:
    drawn = picture(tmp_path / "a.png", 0.25)
    assert drawn.shape == empty.shape
    rows = [row for dashboard in DASHBOARDS for row in dashboard.rows]
    pixels_per_inch = drawn.shape[0] / sum(map(height_inches, rows))
    changed, top = 0, 0.0
    for row in rows:
        bottom, width = top + height_inches(row) * pixels_per_inch, drawn.shape[1] // len(row.panels)
        for index in range(len(row.panels)):
            cell = np.s_[round(top) : round(bottom), index * width : (index + 1) * width]
            changed += (drawn[cell] != empty[cell]).any()
        top = bottom
    panels: list[Panel] = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
    assert changed == len(panels)
