"""One HTML file that needs nothing else, and the same as JSON.

Knows results and verdicts; measures nothing.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hidrop_loadtests.judging import Verdict
from hidrop_loadtests.running import Result
from hidrop_loadtests.scenarios import Scenario

COLOURS = ("#0b6e4f", "#b5452c")
DASHES = ("none", "6 4")
TITLES = {"ttft": "Time to first token", "itl": "Between two tokens", "e2e": "Whole request"}
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 230, 44, 34
LEAST_MS = 1.0
"""A shorter time is tokens that came in one read: what it is divided by says nothing."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1b1f23 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } caption { text-align: left; color: #57606a }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #d0d7de }
th:first-child, td:first-child { text-align: left }
.words th, .words td { text-align: left }
.passed { color: #0b6e4f } .missed { color: #b5452c; font-weight: 600 }
figure { display: inline-block; margin: 0 1rem 1rem 0 } svg text { font: 11px system-ui, sans-serif; fill: #57606a }
details { margin: 1rem 0 } pre { overflow: auto }
"""


def as_json(name: str, scenario: Scenario, results: Sequence[Result], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Everything that was measured, plain data."""
    return {
        "scenario": name,
        "definition": scenario.model_dump(mode="json"),
        "passed": all(verdict.passed for verdict in verdicts),
        "verdicts": [vars(verdict) for verdict in verdicts],
        "arms": [_arm(result) for result in results],
        "speed_up": speed_up(results),
    }


def speed_up(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Second arm's times by the first's, above 1 where the first is faster; none for a single arm or times near 0."""
    if len(results) != 2:
        return {}
    first, second = (result.client_ms() for result in results)
    return {
        name: {figure: second[name][figure] / value for figure, value in first[name].items() if value >= LEAST_MS}
        for name in first.keys() & second.keys()
    }


def as_html(found: Mapping[str, Any], times_ms: Sequence[Mapping[str, list[float]]]) -> str:
    """The page for what :func:`as_json` gave, with the distribution of every time of every arm."""
    names = [arm["name"] for arm in found["arms"]]
    charts = "".join(_chart(TITLES[key], names, [times[key] for times in times_ms]) for key in TITLES)
    verdict = '<span class="passed">passed</span>' if found["passed"] else '<span class="missed">not passed</span>'
    title = html.escape(f"Load test {found['scenario']}")
    definition = "\n".join(f"{key} = {value}" for key, value in found["definition"].items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{title}: {verdict}</h1><p>{html.escape(found['definition']['summary'])}</p>"
        f"{_verdict_table(found)}{_count_table(found)}{_time_table(found)}{charts}{_saving_table(found)}"
        f"<details><summary>Definition</summary><pre>{html.escape(definition)}</pre></details>"
        f"{_counters(found)}</body></html>\n"
    )


def _arm(result: Result) -> dict[str, Any]:
    kinds = ("answered", "refused", "cancelled", "failed")
    times = result.client_ms()
    return {
        "name": result.arm.name,
        "url": result.arm.endpoint.url,
        "model": result.arm.endpoint.model,
        "seconds": result.seconds,
        "requests": {kind: result.count(kind) for kind in kinds},
        "requests_per_second": result.count("answered") / result.seconds,
        "goodput_per_second": result.good / result.seconds,
        "output_tokens_per_second": sum(o.output_tokens for o in result.outcomes) / result.seconds,
        "client_ms": times,
        "server_ms": result.server_ms(),
        "savings": result.growth.savings(),
        "idle_seconds": result.idle_seconds,
        "outcomes": [vars(o) | {"itls": list(o.itls)} for o in result.outcomes],
    }


def _verdict_table(found: Mapping[str, Any]) -> str:
    rows = [
        [v["arm"], v["what"], v["wanted"], v["found"], ("passed", "missed")[not v["passed"]]] for v in found["verdicts"]
    ]
    return _table("Thresholds of the scenario", ["at", "what", "wanted", "found", ""], rows, marked=True)


def _count_table(found: Mapping[str, Any]) -> str:
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
    caption = f"Requests; goodput: first token in {goal['ttft_ms']:g} ms and the whole in {goal['e2e_ms']:g} ms"
    return _table(caption, heads, rows)


def _time_table(found: Mapping[str, Any]) -> str:
    figures = ("mean", "p50", "p90", "p95", "p99")
    rows = []
    for key, title in TITLES.items():
        for arm in found["arms"]:
            for who in ("client", "server"):
                values = arm[f"{who}_ms"].get(key)
                if values:
                    cells = [f"{values[figure]:.1f}" if figure in values else "" for figure in figures]
                    rows.append([f"{title}, {arm['name']}, by the {who}", *cells])
        ratios = found["speed_up"].get(key, {})
        if ratios:
            cells = [f"{ratios[figure]:.2f}x" if figure in ratios else "" for figure in figures]
            rows.append([f"{title}, {found['arms'][1]['name']} / {found['arms'][0]['name']}", *cells])
    caption = "Times in ms. The server's percentiles are interpolated in its buckets; its clock starts at arrival"
    return _table(caption, ["", *figures], rows)


def _saving_table(found: Mapping[str, Any]) -> str:
    rows = [
        [f"{title}, {arm['name']}", f"{pair['dense']:,.0f}", f"{pair['run']:,.0f}", f"{pair['ratio']:.2f}x"]
        for arm in found["arms"]
        for title, pair in arm["savings"]["pairs"].items()
    ]
    return _table("Savings, from /metrics before and after", ["", "dense", "run", "ratio"], rows) if rows else ""


def _counters(found: Mapping[str, Any]) -> str:
    lines = [f"{a['name']}: {key} {value:g}" for a in found["arms"] for key, value in a["savings"]["counters"].items()]
    shown = html.escape("\n".join(lines))
    return f"<details><summary>Counters that grew</summary><pre>{shown}</pre></details>" if lines else ""


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], marked: bool = False) -> str:
    def cells(row: Sequence[str]) -> str:
        kind = f' class="{row[-1]}"' if marked else ""
        plain = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[:-1])
        return f"{plain}<td{kind}>{html.escape(row[-1])}</td>"

    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    words = ' class="words"' if marked else ""
    return f"<table{words}><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def _chart(title: str, names: Sequence[str], times: Sequence[Sequence[float]]) -> str:
    """Share of the requests (or gaps) that took at most so long."""
    most = max((max(values) for values in times if values), default=0.0)
    if most <= 0:
        return ""
    step = _round_step(most)
    right = step * math.ceil(most / step)
    ticks = [index * step for index in range(round(right / step) + 1)]
    axis = "".join(
        f'<line x1="{_x(t, right)}" x2="{_x(t, right)}" y1="10" y2="{HEIGHT - BOTTOM}" stroke="#eaeef2"/>'
        f'<text x="{_x(t, right)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )
    axis += "".join(
        f'<text x="{LEFT - 6}" y="{_y(share) + 4}" text-anchor="end">{share:.0%}</text>' for share in (0, 0.5, 0.9, 1)
    )
    lines = "".join(
        f'<polyline fill="none" stroke="{COLOURS[n]}" stroke-width="2" stroke-dasharray="{DASHES[n]}" '
        f'points="{_steps(values, right)}"/>'
        f'<text x="{WIDTH - 8}" y="{_y(0) - 22 + 15 * n}" text-anchor="end" style="fill:{COLOURS[n]}">'
        f"{html.escape(names[n])} ({len(values)})</text>"
        for n, values in enumerate(times)
        if values
    )
    label = html.escape(f"{title}: share of all that took at most so many ms")
    return (
        f'<figure><figcaption>{html.escape(title)}, ms</figcaption><svg role="img" aria-label="{label}" '
        f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">{axis}{lines}</svg></figure>'
    )


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
