"""The page that is printed, and the JSON that is written."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from vllm_hidrop.bench.rows import Row, versions
from vllm_hidrop.bench.tables import HEADINGS, cells
from vllm_hidrop.terminal import Terminal
from vllm_hidrop.verify.comparing import Check, Status
from vllm_hidrop.verify.engines import Ran

FAILED, COULD_NOT_RUN = 1, 2  # exit statuses
WIDTH = 150  # columns of the page where it is not a terminal's
COLUMNS = ("what", "stock", "ours", "ratio", "ideal", "more")  # of bench's tables
STYLES = {Status.PASSED: "green", Status.FAILED: "bold red", Status.NOT_RUN: "yellow"}


@dataclass
class Report:
    """What was found so far; ``engines`` are the facts of every engine that ran, by its type."""

    model: str | None
    shape: str
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, checks: Sequence[Check], ran: Sequence[Ran] = ()) -> None:
        """Add checks, and the facts of engines that were not seen before."""
        self.checks += checks
        for facts in (engine.facts for engine in ran):
            if facts and facts not in self.engines:
                self.engines.append(facts)

    @property
    def exit_status(self) -> int:
        """0: every check that ran has passed; 1: one has failed; 2: none has run."""
        found = {check.status for check in self.checks}
        if Status.FAILED in found:
            return FAILED
        return 0 if Status.PASSED in found else COULD_NOT_RUN

    @property
    def verdict(self) -> str:
        """One line: how it ended."""
        counts = Counter(check.status for check in self.checks)
        word = {0: "passed", FAILED: "FAILED", COULD_NOT_RUN: "could not run"}[self.exit_status]
        return f"hidrop verify: {word} ({', '.join(f'{counts[s]} {s}' for s in Status)}), {self.seconds:.0f} s"

    def as_json(self) -> str:
        """Everything, for programs."""
        found = {
            "verdict": self.verdict,
            "exit_status": self.exit_status,
            "model": self.model,
            "weights": self._weights(),
            "seconds": round(self.seconds, 1),
            "versions": versions(),
            "engines": self.engines,
            "checks": [asdict(check) for check in self.checks],
            "timing": self.rows,
        }
        return json.dumps(found, indent=2) + "\n"

    def _weights(self) -> str:
        own = f", {self.model} with its own" if self.model else ""
        return f"random ones for correctness{own}; random ones of the {self.shape} shape for times"

    def header(self) -> list[str]:
        """What was verified: versions, machine, and the code of vLLM that ran."""
        found = versions()
        machine = f"{found.get('gpu', 'no GPU')}, {found['machine']}, {found['cpus']} cores"
        names = ("vllm_hidrop", "vllm", "torch", "python")
        lines = [", ".join(f"{name} {found[name]}" for name in names), f"{machine}; weights: {self._weights()}"]
        for facts in self.engines:
            scheduling = "asynchronous" if facts["async_scheduling"] else "synchronous"
            lines.append(
                f"{facts['dtype']}: runner {facts['runner']}, attention {' '.join(facts['attention'])}, "
                f"CUDA graphs {facts['graphs']}, compilation {facts['compilation']}, {scheduling} scheduling"
            )
        return lines

    def show(self) -> None:
        """Print the page."""
        console = Terminal(highlight=False, markup=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = WIDTH
        for line in (self.verdict, *self.header()):
            console.print(line)
        table = Table("what", "", "seen, or why not run", title="Correctness", title_justify="left")
        subjects = list(dict.fromkeys(check.subject for check in self.checks))
        for subject in subjects:
            table.add_row(subject, "", "", style="bold")
            for check in (found for found in self.checks if found.subject == subject):
                table.add_row(f"  {check.name}", str(check.status), check.detail, style=STYLES[check.status])
            table.add_section()
        console.show(table)
        if self.rows:
            title = f"Ours against stock vLLM in turn, medians; {self.shape} shape, bfloat16, 64 text tokens"
            timing = Table(*COLUMNS, title=title, title_justify="left")
            for row in self.rows:
                by_heading = dict(zip(HEADINGS, cells(row), strict=True))
                timing.add_row(*(by_heading[heading] for heading in COLUMNS))
            console.show(timing)
