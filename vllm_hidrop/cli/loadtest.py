"""``hidrop loadtest``: a scenario of `hidrop_loadtests` against a server that runs, or one that is started for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from vllm_hidrop.cli.local_server import asked_server
from vllm_hidrop.outputs import check_file, write_file
from vllm_hidrop.terminal import Terminal

if TYPE_CHECKING:
    from hidrop_loadtests.judging import Verdict
    from hidrop_loadtests.running import Arm, Keys, Result
    from hidrop_loadtests.scenarios import Scenario

ALONE, OFF = SAME_SERVER = ("none", "off")


@dataclass(frozen=True)
class Target:
    """What is tested, and with what it is compared."""

    url: str | None  # a running server; None: the embedded model is served for the test
    compare: str  # "off": the same server keeping every token; "none"; or another server's address
    keys: "Keys"  # of both servers
    allow_remote: bool  # whether an address may be another machine's


def show_scenarios(file: Path | None) -> None:
    """Print every scenario with its question. Raises ValueError: the file has a mistake."""
    from hidrop_loadtests import scenarios

    table = Table("scenario", "requests", "seconds", "arrivals", "question")
    for name, scenario in scenarios.load(file or scenarios.SHIPPED).items():
        table.add_row(name, str(scenario.requests), f"{scenario.seconds:g}", scenario.arrivals.kind, scenario.summary)
    Terminal().show(table)


def run(name: str, scenario: "Scenario", target: Target, out: Path, pairs: int = 1) -> int:
    """Run, show, write ``NAME.json`` and ``.html``; 1 if a threshold was missed. Raises ValueError: no such server."""
    from hidrop_loadtests import report
    from hidrop_loadtests.judging import judge
    from hidrop_loadtests.running import check_address
    from hidrop_loadtests.running import run as run_scenario

    for address in (target.url, target.compare if target.compare not in SAME_SERVER else None):
        if address is not None:
            check_address(address, target.allow_remote)
    files = {kind: out / f"{name}.{kind}" for kind in ("html", "json")}
    for file in files.values():
        check_file(file)
    console = Terminal()
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress, asked_server(target.url, progress) as url:
        progress.stop()  # vLLM's client draws its own
        arms = _arms(url, target)
        results = run_scenario(scenario, arms, pairs, lambda arm: console.print(f"{name}: {arm}", markup=False))
    verdicts = [verdict for result in results for verdict in judge(scenario, result)]
    found = report.as_json(name, scenario, results, verdicts)
    try:
        _print(console, results, verdicts)
    finally:  # a reader that left does not cost the files
        write_file(files["json"], json.dumps(found, indent=1) + "\n")
        write_file(files["html"], report.as_html(found, [result.times_ms() for result in results]))
    console.print(f"report: {files['html']}, {files['json']}", markup=False)
    return 0 if found["passed"] else 1


def _arms(url: str, target: Target) -> "list[Arm]":
    from hidrop_loadtests.running import OFF as KEEP_ALL
    from hidrop_loadtests.running import Arm, check_address, connect

    first = Arm("pruned", connect(check_address(url, target.allow_remote), target.keys), prunes=True)
    if target.compare == ALONE:
        return [first]
    if target.compare == OFF:
        return [first, Arm(OFF, connect(first.endpoint.url, target.keys, KEEP_ALL), prunes=False)]
    other = check_address(target.compare, target.allow_remote)
    return [first, Arm(other, connect(other, target.keys), prunes=False)]


def _print(console: Terminal, results: "Sequence[Result]", verdicts: "Sequence[Verdict]") -> None:
    times = Table("", "answered", "requests/s", "TTFT p50", "TTFT p99", "ITL p50", "E2E p99", title="client, ms")
    for result in results:
        found = result.client_ms()
        cells = [("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("e2e", "p99")]
        shown = [f"{found[key][figure]:.1f}" if key in found else "" for key, figure in cells]
        answered = result.count("answered")
        times.add_row(result.arm.name, str(answered), f"{answered / result.seconds:.2f}", *shown)
    console.show(times)
    judged = Table("at", "threshold", "wanted", "found", "")
    for verdict in verdicts:
        mark = "passed" if verdict.passed else "[red]missed[/red]"
        judged.add_row(verdict.arm, verdict.what, verdict.wanted, verdict.found, mark)
    console.show(judged)
