"""Fill the generated parts of README.md and docs: gate, tables of docs/bench.json, metrics, methods' docstrings.

``python scripts/readme.py`` writes, ``--check`` only compares (exit code 1 when one of them is out of date).
"""

import re
import sys
from pathlib import Path

from hidrop_server.metrics import METRICS
from vllm_hidrop.bench.rows import read_rows
from vllm_hidrop.bench.tables import markdown_sections, markdown_summary
from vllm_hidrop.cli.methods import about
from vllm_hidrop.engine.gate import CHECKED, RULES
from vllm_hidrop.methods import METHODS

ROOT = Path(__file__).parents[1]


def gate_table() -> str:
    """One row per rule, then one per setting that works."""
    refused = [f"| {rule.setting} | {rule.reason} |" for rule in RULES]
    works = [f"| {each.setting} | `{each.test.replace('::', '` `')}` |" for each in CHECKED]
    return "\n".join(
        [
            "| refused | because |",
            "|---|---|",
            *refused,
            "",
            "| works | checked in tests/engine by |",
            "|---|---|",
            *works,
        ]
    )


def metrics_table() -> str:
    """One row per metric."""
    rows = (
        f"| `{spec.shown}` | {spec.kind} | {', '.join(f'`{label}`' for label in spec.labels)} | {spec.help} |"
        for spec in METRICS
    )
    return "\n".join(["| metric | type | labels of its own | meaning |", "|---|---|---|---|", *rows])


def method_sections() -> str:
    """One section per method: its docstring."""
    return "\n\n".join(f"## `{name}` ({method.paper})\n\n{about(method)}" for name, method in METHODS.items())


def fill(text: str, part: str, content: str) -> str:
    """Put ``content`` between the markers of ``part``."""
    pattern = re.compile(rf"(<!-- {part}:begin[^>]*-->\n).*?(<!-- {part}:end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def main() -> int:
    """Write or check."""
    rows = read_rows(ROOT / "docs" / "bench.json")
    parts = {
        ROOT / "README.md": {"gate": gate_table(), "numbers": markdown_summary(rows)},
        ROOT / "docs" / "performance.md": {"numbers": markdown_sections(rows)},
        ROOT / "docs" / "metrics.md": {"metrics": metrics_table()},
        ROOT / "docs" / "methods.md": {"methods": method_sections()},
    }
    is_current = True
    for file, contents in parts.items():
        old = new = file.read_text()
        for part, content in contents.items():
            new = fill(new, part, content)
        is_current = is_current and new == old
        if "--check" not in sys.argv:
            file.write_text(new)
    return int("--check" in sys.argv and not is_current)


if __name__ == "__main__":
    sys.exit(main())
