"""The picture of the dashboards, from answers that Prometheus could have given."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_hidrop.monitoring.draw import draw
from vllm_hidrop.monitoring.panels import DASHBOARDS, Panel
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
    height = sum(-(-len(row.panels) // 4) for row in rows)
    changed = 0
    line = 0
    for row in rows:
        for index in range(len(row.panels)):
            top = (line + index // 4) * drawn.shape[0] // height
            left = index % 4 * drawn.shape[1] // 4
            cell = np.s_[top : top + drawn.shape[0] // height, left : left + drawn.shape[1] // 4]
            changed += (drawn[cell] != empty[cell]).any()
        line += -(-len(row.panels) // 4)
    panels: list[Panel] = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
    assert changed == len(panels)
