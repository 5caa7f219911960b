"""One HTML file that needs nothing else, and the same as JSON.

Knows results and verdicts; measures nothing.
"""

import datetime
import html
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hidrop_loadtests.judging import Verdict
from hidrop_loadtests.running import Result
from hidrop_loadtests.scenarios import Scenario

TITLES = {"ttft": "Time to first token", "itl": "Between two tokens", "e2e": "Whole request"}
FIGURES = ("mean", "p50", "p90", "p95", "p99")
DASHES = ("none", "6 4")
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 230, 44, 34
LEAST_MS = 1.0
"""A shorter time is tokens that came in one read: its ratio to another says nothing."""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --soft: #57606a; --line: #d0d7de; --tile: #f6f8fa;
  --a: #0b6e4f; --b: #b5452c; --page: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b3; --line: #30363d; --tile: #161b22;
  --a: #3fb98f; --b: #f0835f; --page: #0d1117 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  color: var(--ink); background: var(--page) }
h1 { margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem } .soft, caption { color: var(--soft) }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .2rem }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } .words th, .words td { text-align: left }
.passed { color: var(--a); font-weight: 600 } .missed { color: var(--b); font-weight: 700 }
.tiles, .times { display: flex; flex-wrap: wrap; gap: .8rem; align-items: center } .times { gap: 0 2rem }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem;
  min-width: 9rem }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3 }
figure { margin: 0 } svg { overflow: visible } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
svg .grid { stroke: var(--line) } svg .arm0 { stroke: var(--a) } svg .arm1 { stroke: var(--b) }
svg text.of0 { fill: var(--a) } svg text.of1 { fill: var(--b) }
details { margin: 1rem 0 } pre { overflow: auto }
"""


def as_json(name: str, scenario: Scenario, results: Sequence[Result], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Everything that was measured, plain data."""
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
    """Second arm's times by the first's, above 1 where the first is faster; none for a single arm or times near 0."""
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
    """The page for what :func:`as_json` gave, with the distribution of every time of every arm."""
    verdict = '<span class="passed">passed</span>' if found["passed"] else '<span class="missed">not passed</span>'
    title = html.escape(f"Load test {found['scenario']}")
    definition = "\n".join(f"{key} = {value}" for key, value in found["definition"].items())
    times = "".join(_times(found, key, [each[key] for each in times_ms]) for key in TITLES)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}: {verdict}</h1><p>{html.escape(found['definition']['summary'])}</p>{_origin(found)}"
        f"{_tiles(found)}{_verdict_table(found)}{_trouble_table(found)}{_count_table(found)}{times}{_saving_table(found)}"
        f"<details><summary>Definition</summary><pre>{html.escape(definition)}</pre></details>"
        f"{_counters(found)}</body></html>\n"
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


def _origin(found: Mapping[str, Any]) -> str:
    servers = dict.fromkeys(f"{arm['model']} at {arm['url']}" for arm in found["arms"])
    made = found["measured"]
    text = f"{', '.join(servers)}; client and clock: {made['client']}; vllm-hidrop {made['vllm_hidrop']}; {made['at']}"
    return f'<p class="soft">{html.escape(text)}</p>'


def _tiles(found: Mapping[str, Any]) -> str:
    """What to see first: the ratios to the other arm, and what the first one saved."""
    arms = found["arms"]
    tiles = []
    for key in ("ttft", "e2e"):
        values = [f"{arm['client_ms'][key]['p50']:,.0f} ms" for arm in arms if key in arm["client_ms"]]
        ratio = found["speed_up"].get(key, {}).get("p50")
        if values:
            big = values[0] if ratio is None else f"{ratio:.1f}x less" if ratio >= 1 else f"{1 / ratio:.1f}x more"
            tiles.append((f"{TITLES[key]}, median", big, " against ".join(values)))
    rates = [f"{arm['goodput_per_second']:.2f}" for arm in arms]
    tiles.append(("Goodput, requests/s", rates[0], " against ".join(rates)))
    for title in ("layer tokens of prefills", "KV blocks held", "prefill FLOPs"):
        if (pair := arms[0]["savings"]["pairs"].get(title)) is None:
            continue
        less = f"{1 - pair['run'] / pair['dense']:.0%} less"
        tiles.append((title[0].upper() + title[1:], less, f"{_short(pair['run'])} of {_short(pair['dense'])}"))
    shown = "".join(
        f'<div class="tile">{html.escape(what)}<b>{html.escape(big)}</b>'
        f'<span class="soft">{html.escape(small)}</span></div>'
        for what, big, small in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _verdict_table(found: Mapping[str, Any]) -> str:
    rows = [
        [v["what"], v["arm"], v["wanted"], v["found"], "passed" if v["passed"] else "missed"]
        for v in sorted(found["verdicts"], key=lambda v: v["passed"])
    ]
    return _table("Thresholds", "", ["", "at", "wanted", "found", ""], rows, "words")


def _trouble_table(found: Mapping[str, Any]) -> str:
    """Whatever was not simply answered, counted: the first thing to read when a threshold was missed."""
    counts = Counter(
        (arm["name"], outcome["bad"] or "a good request", outcome["kind"], outcome["error"])
        for arm in found["arms"]
        for outcome in arm["outcomes"]
        if outcome["kind"] not in ("answered", "cancelled") or outcome["bad"]
    )
    rows = [[what, arm, kind, error[:160], str(count)] for (arm, what, kind, error), count in sorted(counts.items())]
    caption = "Bad requests, and good ones without an answer"
    return _table("Not answered", caption, ["", "at", "was", "for", "times"], rows, "words") if rows else ""


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
    caption = (
        f"Goodput: answers whose first token came in {goal['ttft_ms']:g} ms and whose last in {goal['e2e_ms']:g} ms"
    )
    return _table("Requests", caption, heads, rows)


def _times(found: Mapping[str, Any], key: str, times: Sequence[Sequence[float]]) -> str:
    """One kind of time: its distribution, and client's and server's figures side by side."""
    rows = []
    for arm in found["arms"]:
        for who in ("client", "server"):
            values = arm[f"{who}_ms"].get(key)
            if values:
                rows.append([f"{arm['name']}, {who}", *(_ms(values.get(figure)) for figure in FIGURES)])
    ratios = found["speed_up"].get(key, {})
    if ratios:
        cells = [f"{ratios[figure]:.2f}x" if figure in ratios else "" for figure in FIGURES]
        rows.append([f"{found['arms'][1]['name']} / {found['arms'][0]['name']}, client", *cells])
    if not rows:
        return ""
    notes = {
        "ttft": "The server's clock starts at a request's arrival; its percentiles are interpolated in its buckets.",
        "itl": "0: tokens that reached the client in one read.",
        "e2e": "",
    }
    names = [arm["name"] for arm in found["arms"]]
    table = _table("", f"ms, by the clock of the client and of the server. {notes[key]}", ["", *FIGURES], rows)
    return f'<h2>{TITLES[key]}</h2><div class="times">{_chart(TITLES[key], names, times)}{table}</div>'


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _saving_table(found: Mapping[str, Any]) -> str:
    rows = [
        [title, arm["name"], f"{pair['dense']:,.0f}", f"{pair['run']:,.0f}", f"{pair['ratio']:.2f}x"]
        for title in dict.fromkeys(title for arm in found["arms"] for title in arm["savings"]["pairs"])
        for arm in found["arms"]
        if (pair := arm["savings"]["pairs"].get(title))
    ]
    caption = "What the servers counted, /metrics after less /metrics before"
    return _table("Savings", caption, ["", "at", "dense", "run", "ratio"], rows) if rows else ""


def _short(value: float) -> str:
    """Three digits and a letter."""
    power = max(0, min(5, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g}{('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _counters(found: Mapping[str, Any]) -> str:
    lines = [f"{a['name']}: {key} {value:g}" for a in found["arms"] for key, value in a["savings"]["counters"].items()]
    shown = html.escape("\n".join(lines))
    return f"<details><summary>Counters that grew</summary><pre>{shown}</pre></details>" if lines else ""


def _table(title: str, caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    above = f"<h2>{html.escape(title)}</h2>" if title else ""
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'{above}<table class="{kind}">{said}<tr>{head}</tr>{body}</table>'


def _cell(text: str) -> str:
    mark = {"passed": "✓ ", "missed": "✗ "}.get(text)
    return f'<td class="{text}">{mark}{text}</td>' if mark else f"<td>{html.escape(text)}</td>"


def _chart(title: str, names: Sequence[str], times: Sequence[Sequence[float]]) -> str:
    """Share of the requests (or gaps) that took at most so long."""
    most = max((max(values) for values in times if values), default=0.0)
    if most <= 0:
        return ""
    step = _round_step(most)
    right = step * math.ceil(most / step)
    label = html.escape(f"{title}: share of all that took at most so many ms")
    return (
        f'<figure><svg role="img" aria-label="{label}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(_axes(step, right))}{"".join(_lines(names, times, right))}'
        "</svg></figure>"
    )


def _axes(step: float, right: float) -> Iterator[str]:
    for index in range(round(right / step) + 1):
        x = _x(index * step, right)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="10" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{index * step:g}</text>'
    for share in (0, 0.5, 0.9, 1):
        yield f'<text x="{LEFT - 6}" y="{_y(share) + 4}" text-anchor="end">{share:.0%}</text>'
    yield f'<text x="{WIDTH - 12}" y="{HEIGHT - 4}" text-anchor="end">at most so many ms</text>'


def _lines(names: Sequence[str], times: Sequence[Sequence[float]], right: float) -> Iterator[str]:
    for n, values in enumerate(times):
        if values:
            yield (
                f'<polyline class="arm{n}" fill="none" stroke-width="2" stroke-dasharray="{DASHES[n]}" '
                f'points="{_steps(values, right)}"/>'
                f'<text class="of{n}" x="{WIDTH - 14}" y="{_y(0) - 22 + 15 * n}" text-anchor="end">'
                f"{html.escape(names[n])} ({len(values)})</text>"
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
