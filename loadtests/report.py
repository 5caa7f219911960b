"""A load test's results as JSON, and as one self-contained HTML file."""

import datetime
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hidrop_loadtests.judging import Verdict
from hidrop_loadtests.running import Result
from hidrop_loadtests.scenarios import Scenario

TITLES = {"ttft": "Time to first token", "itl": "Between two tokens", "e2e": "Whole request"}
FIGURES = ("mean", "p50", "p90", "p95", "p99")
DASHES = ("none", "6 4")
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 230, 44, 34
NOTES = {
    "ttft": "The server's clock starts at a request's arrival; its percentiles are interpolated in its buckets.",
    "itl": "0: tokens that reached the client in one read.",
    "e2e": "",
}
MARKS = {"passed": "✓ ", "missed": "✗ "}  # before a verdict's cell
LEAST_MS = 1.0  # shorter times are tokens that came in one read: a ratio of two says nothing


def as_json(name: str, scenario: Scenario, results: Sequence[Result], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    return {
        "scenario": name,
        "definition": scenario.model_dump(mode="json"),
        "measured": {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "client": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "vllm_hidrop": version("vllm-hidrop"),
        },
        "passed": all(verdict.passed for verdict in verdicts),
        "verdicts": [vars(verdict) for verdict in verdicts],
        "arms": [_arm(scenario, result) for result in results],
        "speed_up": speed_up(results),
    }


def speed_up(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """The second arm's times over the first's (above 1: first is faster); none for a single arm or times near 0."""
    if len(results) != 2:
        return {}
    first, second = (result.client_ms() for result in results)
    return {
        name: {
            figure: second[name][figure] / value
            for figure, value in first[name].items()
            if min(value, second[name][figure]) >= LEAST_MS
        }
        for name in TITLES
        if name in first and name in second
    }


def as_html(found: Mapping[str, Any], times_ms: Sequence[Mapping[str, list[float]]]) -> str:
    """The HTML page for the data of :func:`as_json`; ``times_ms``: every time of every arm, for the distributions."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html").render(
        found=found,
        marks=MARKS,
        origin=_origin(found),
        tiles=list(_tiles(found)),
        tables=[_verdicts(found), *_troubles(found), _counts(found)],
        times=[times for key in TITLES for times in _times(found, key, [each[key] for each in times_ms])],
        savings=_savings(found),
        counters="\n".join(
            f"{arm['name']}: {key} {value:g}"
            for arm in found["arms"]
            for key, value in arm["savings"]["counters"].items()
        ),
    )


def _arm(scenario: Scenario, result: Result) -> dict[str, Any]:
    kinds = ("answered", "refused", "cancelled", "failed")
    return {
        "name": result.arm.name,
        "url": result.arm.endpoint.url,
        "model": result.arm.endpoint.model,
        "seconds": result.seconds,
        "requests": {kind: result.count(kind) for kind in kinds},
        "requests_per_second": result.count("answered") / result.seconds,
        "goodput_per_second": result.within(scenario.goal) / result.seconds,
        "output_tokens_per_second": sum(o.output_tokens for o in result.outcomes) / result.seconds,
        "client_ms": result.client_ms(),
        "server_ms": result.server_ms(),
        "savings": result.growth.savings(),
        "idle_seconds": result.idle_seconds,
        "outcomes": [vars(o) | {"itls": list(o.itls)} for o in result.outcomes],
    }


@dataclass(frozen=True)
class Table:
    """A table of texts; ``kind`` is a class of the style sheet."""

    title: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = ""


def _origin(found: Mapping[str, Any]) -> str:
    servers = dict.fromkeys(f"{arm['model']} at {arm['url']}" for arm in found["arms"])
    made = found["measured"]
    return f"{', '.join(servers)}; client and clock: {made['client']}; vllm-hidrop {made['vllm_hidrop']}; {made['at']}"


def _tiles(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The figures at the top: ratios of the first arm to the other, and what the first one saved."""
    arms = found["arms"]
    for key in ("ttft", "e2e"):
        values = [f"{arm['client_ms'][key]['p50']:,.0f} ms" for arm in arms if key in arm["client_ms"]]
        ratio = found["speed_up"].get(key, {}).get("p50")
        if values:
            much = values[0] if ratio is None else f"{ratio:.1f}x less" if ratio >= 1 else f"{1 / ratio:.1f}x more"
            yield {"what": f"{TITLES[key]}, median", "much": much, "of": " against ".join(values)}
    rates = [f"{arm['goodput_per_second']:.2f}" for arm in arms]
    yield {"what": "Goodput, requests/s", "much": rates[0], "of": " against ".join(rates)}
    for title in ("layer tokens of prefills", "KV blocks held", "prefill FLOPs"):
        if pair := arms[0]["savings"]["pairs"].get(title):
            less = f"{1 - pair['run'] / pair['dense']:.0%} less"
            of = f"{_short(pair['run'])} of {_short(pair['dense'])}"
            yield {"what": title[0].upper() + title[1:], "much": less, "of": of}


def _verdicts(found: Mapping[str, Any]) -> Table:
    rows = [
        [v["what"], v["arm"], v["wanted"], v["found"], "passed" if v["passed"] else "missed"]
        for v in sorted(found["verdicts"], key=lambda v: v["passed"])
    ]
    return Table("Thresholds", "", ["", "at", "wanted", "found", ""], rows, "words")


def _troubles(found: Mapping[str, Any]) -> list[Table]:
    """Requests that were not simply answered, counted by cause: the first thing to read when a threshold was missed."""
    counts = Counter(
        (arm["name"], outcome["bad"] or "a good request", outcome["kind"], outcome["error"])
        for arm in found["arms"]
        for outcome in arm["outcomes"]
        if outcome["kind"] not in ("answered", "cancelled") or outcome["bad"]
    )
    rows = [[what, arm, kind, error[:160], str(count)] for (arm, what, kind, error), count in sorted(counts.items())]
    caption = "Bad requests, and good ones without an answer"
    return [Table("Not answered", caption, ["", "at", "was", "for", "times"], rows, "words")] if rows else []


def _counts(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            arm["name"],
            *(str(count) for count in arm["requests"].values()),
            f"{arm['requests_per_second']:.2f}",
            f"{arm['goodput_per_second']:.2f}",
            f"{arm['output_tokens_per_second']:.1f}",
        ]
        for arm in found["arms"]
    ]
    heads = ["", "answered", "refused", "went away", "failed", "requests/s", "goodput/s", "tokens/s"]
    goal = found["definition"]["goal"]
    caption = (
        f"Goodput: answers whose first token came in {goal['ttft_ms']:g} ms and whose last in {goal['e2e_ms']:g} ms"
    )
    return Table("Requests", caption, heads, rows)


def _times(found: Mapping[str, Any], key: str, times: Sequence[Sequence[float]]) -> Iterator[dict[str, Any]]:
    """One kind of time, if measured: its distribution, and the client's and the server's figures side by side."""
    rows = [
        [f"{arm['name']}, {who}", *(_ms(values.get(figure)) for figure in FIGURES)]
        for arm in found["arms"]
        for who in ("client", "server")
        if (values := arm[f"{who}_ms"].get(key))
    ]
    if ratios := found["speed_up"].get(key):
        cells = [f"{ratios[figure]:.2f}x" if figure in ratios else "" for figure in FIGURES]
        rows.append([f"{found['arms'][1]['name']} / {found['arms'][0]['name']}, client", *cells])
    if rows:
        caption = f"ms, by the clock of the client and of the server. {NOTES[key]}"
        names = [arm["name"] for arm in found["arms"]]
        chart = _chart(TITLES[key], names, times)
        yield {"title": TITLES[key], "chart": chart, "table": Table("", caption, ["", *FIGURES], rows)}


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _savings(found: Mapping[str, Any]) -> Table:
    rows = [
        [title, arm["name"], f"{pair['dense']:,.0f}", f"{pair['run']:,.0f}", f"{pair['ratio']:.2f}x"]
        for title in dict.fromkeys(title for arm in found["arms"] for title in arm["savings"]["pairs"])
        for arm in found["arms"]
        if (pair := arm["savings"]["pairs"].get(title))
    ]
    caption = "What the servers counted, /metrics after less /metrics before"
    return Table("Savings", caption, ["", "at", "dense", "run", "ratio"], rows)


def _short(value: float) -> str:
    """A number as three digits and a letter: 12.3M."""
    power = max(0, min(5, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g}{('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _chart(title: str, names: Sequence[str], times: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Share of the requests (or gaps) that took at most so many ms, as the numbers and texts of an SVG."""
    most = max((max(values) for values in times if values), default=0.0)
    if most <= 0:
        return None
    step = _round_step(most)
    right = step * math.ceil(most / step)
    return {
        **{"title": title, "width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": HEIGHT - BOTTOM},
        "ticks": [(_x(n * step, right), f"{n * step:g}") for n in range(round(right / step) + 1)],
        "shares": [(_y(share), f"{share:.0%}") for share in (0, 0.5, 0.9, 1)],
        "lines": [
            {"number": n, "dash": DASHES[n], "points": _steps(values, right), "name": names[n], "count": len(values)}
            for n, values in enumerate(times)
            if values
        ],
    }


def _round_step(most: float) -> float:
    """A 1, 2 or 5 times a power of ten that cuts ``most`` into five parts or fewer."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= most)


def _x(value: float, right: float) -> float:
    return round(LEFT + (WIDTH - LEFT - 12) * value / right, 1)


def _y(share: float) -> float:
    return round(10 + (HEIGHT - BOTTOM - 10) * (1 - share), 1)


def _steps(values: Sequence[float], right: float) -> str:
    points, share = [f"{_x(0, right)},{_y(0)}"], 0.0
    for index, value in enumerate(sorted(values), start=1):
        points.append(f"{_x(value, right)},{_y(share)}")
        share = index / len(values)
        points.append(f"{_x(value, right)},{_y(share)}")
    points.append(f"{_x(right, right)},{_y(1)}")
    return " ".join(points)
