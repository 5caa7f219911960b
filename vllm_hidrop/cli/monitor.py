"""``hidrop monitor``: send traffic to a server that a real Prometheus scrapes, and draw what its dashboards show."""

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_hidrop.cli import demo
from vllm_hidrop.cli.local_server import asked_server
from vllm_hidrop.terminal import Terminal

SCRAPE_SECONDS = 1.0
INTERVAL = "15s"  # of every rate: Prometheus wants four scrapes in it
FIRST_SAMPLE_SECONDS = 60.0
REQUEST_SECONDS = 120.0


@dataclass(frozen=True)
class Traffic:
    """Seconds of traffic, and how many clients send at once; each waits for its answer before it asks again."""

    seconds: float
    clients: int


def run(url: str | None, traffic: Traffic, png: Path) -> int:
    """Send traffic, draw; returns 1 if nothing was answered. Raises ValueError: no Prometheus, server or matplotlib."""
    try:
        import matplotlib  # noqa: F401 (draws at the end; missing it is better said now)
    except ImportError:
        raise ValueError("drawing needs matplotlib: install vllm-hidrop[monitor]") from None
    from vllm_hidrop.monitoring.dashboards import DASHBOARDS
    from vllm_hidrop.monitoring.draw import draw
    from vllm_hidrop.monitoring.prometheus import find_tools, running

    console = Terminal()
    questions, tools = demo.read_questions(demo.find_examples()), find_tools()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, asked_server(url, progress) as address:
        asking = (demo.model_name(address), questions)
        with running([address], None, SCRAPE_SECONDS, progress.refresh, tools) as prometheus:
            wait_for_scrape(prometheus)
            start = time.time()
            answered, refused = drive(address, *asking, traffic, progress)
            time.sleep(2 * SCRAPE_SECONDS)
            lines = ask_panels(prometheus, DASHBOARDS, start, time.time())
    empty = sum(not found for found in lines.values())
    told = f"{answered} requests answered, {refused} refused; {len(lines)} queries, {empty} without data: {png}"
    try:
        console.print(told, highlight=False, markup=False)
    finally:  # a reader that left does not cost the picture
        draw(DASHBOARDS, lines, png)
    return 0 if answered else 1


def wait_for_scrape(prometheus: Any) -> None:
    """Wait for Prometheus' first scrape, so that rates see the first request. Raises ValueError: none comes."""
    deadline = time.monotonic() + FIRST_SAMPLE_SECONDS
    while not any(series.points[-1][1] == 1 for series in prometheus.query('up{job="hidrop"}')):
        if time.monotonic() > deadline:
            raise ValueError("Prometheus cannot scrape the server's /metrics")
        time.sleep(0.2)
    time.sleep(SCRAPE_SECONDS)


def ask_panels(prometheus: Any, dashboards: Any, start: float, end: float) -> dict[str, Any]:
    """Every expression of the dashboards over [start, end] (seconds since 1970); of stats, one value over all of it."""
    from vllm_hidrop.monitoring.panels import fill

    lines = {}
    for panel in (panel for dashboard in dashboards for panel in dashboard.panels):
        for query in panel.queries:
            if panel.is_stat:
                whole = f"{max(1, round(end - start))}s"
                lines[query.expr] = prometheus.query(fill(query.expr, whole))
            else:
                lines[query.expr] = prometheus.query_range(fill(query.expr, INTERVAL), start, end, SCRAPE_SECONDS)
    return lines


def drive(
    url: str, model: str, questions: Sequence[demo.Question], traffic: Traffic, progress: Progress
) -> tuple[int, int]:
    """Ask the demo's questions until the time is up; returns how many were answered, and how many refused."""
    task = progress.add_task("traffic", total=traffic.seconds)
    deadline = time.monotonic() + traffic.seconds
    statuses: list[int] = []

    def client(first: int) -> None:
        for number in count(first, traffic.clients):
            if time.monotonic() > deadline:
                return
            statuses.append(_send(url, _body(model, questions[number % len(questions)], number)))

    threads = [threading.Thread(target=client, args=(first,), daemon=True) for first in range(traffic.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        progress.update(task, completed=traffic.seconds - max(0.0, deadline - time.monotonic()))
        time.sleep(0.1)
    progress.remove_task(task)
    return sum(status == 200 for status in statuses), sum(400 <= status < 500 for status in statuses)


def _body(model: str, question: demo.Question, number: int) -> dict[str, Any]:
    """Of ten requests six are pruned, two off, one text, one refused; one image in ten is reusable, all others new."""
    body = demo.body(model, question, pruned=number % 10 not in (2, 6))
    parts = body["messages"][0]["content"]
    parts[0]["uuid"] = uuid.uuid4().hex if number % 10 else f"monitor-{zlib.crc32(question.image)}"
    if number % 10 == 4:
        del parts[0]
    if number % 10 == 8:
        body["vllm_xargs"] = {"hidrop_keeps": "a misspelt key"}
    return body | {"stream": False, "stream_options": None, "ignore_eos": True, "max_tokens": 8 + number % 17}


def _send(url: str, body: dict[str, Any]) -> int:
    """The HTTP status of one request; 0 when there is no answer."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code
    except (OSError, HTTPException):
        return 0
