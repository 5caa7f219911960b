"""Rows as tables: on the terminal and as Markdown for the documentation."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from vllm_hidrop.bench.goals import goal_of, verdict
from vllm_hidrop.bench.rows import SECTIONS, Row, hardware
from vllm_hidrop.terminal import Terminal

HEADINGS = ("what", "stock", "ours", "ratio", "ideal", "of ideal", "goal", "more")


def cells(row: Row) -> tuple[str, ...]:
    """One row under :data:`HEADINGS`, as texts."""
    ideal = row["ideal_ratio"]
    goal = goal_of(row)
    return (
        row["name"],
        _quantity(row["stock"], row["unit"]),
        _quantity(row["ours"], row["unit"]),
        f"{row['ratio']:.2f}x",
        f"{ideal:.2f}x" if ideal else "",
        f"{row['ratio'] / ideal:.0%}" if ideal else "",
        f"{goal.text}: {verdict(row)}" if goal else "",
        "; ".join(_more(row)),
    )


def _quantity(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "requests" else f"{value:.{2 if value < 10 else 1}f} {unit}"


def _more(row: Row) -> Iterable[str]:
    if "selection_share" in row:
        yield f"selection {row['selection_share']:.1%}"
    if "kv_blocks" in row:
        yield f"{row['kv_blocks']} blocks, plan {row['kv_blocks_planned']}"
    if "over_token_exact" in row:
        yield f"{row['over_token_exact']:.2f}x token-exact"
    if "steps" in row:
        yield f"{row['steps'][0]} and {row['steps'][1]} steps"
    if len(row.get("pair_ratios", ())) > 1:
        yield f"pairs {min(row['pair_ratios']):.2f}x..{max(row['pair_ratios']):.2f}x"


def print_rows(rows: Sequence[Row]) -> None:
    """A table on standard output; below it, the command that measures each row alone, model, machine and versions."""
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*cells(row))
    console = Terminal(width=170)
    console.show(table)
    lines = [f"{row['name']}: {row['command']}" for row in rows] + [hardware(row) for row in rows]
    for line in dict.fromkeys(lines):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def markdown(rows: Sequence[Row]) -> str:
    """One Markdown table; columns that are empty throughout are left out."""
    used = [i for i, heading in enumerate(HEADINGS) if heading in HEADINGS[:4] or any(cells(row)[i] for row in rows)]
    lines = [f"| {' | '.join(HEADINGS[i] for i in used)} |", "|" + "---|" * len(used)]
    lines += [f"| {' | '.join(cells(row)[i] for i in used)} |" for row in rows]
    return "\n".join(lines)


def measured_with(rows: Sequence[Row]) -> str:
    """The lines below a Markdown table that say with what it was measured."""
    return "\n".join(f"- {line}" for line in dict.fromkeys(hardware(row) for row in rows))


def markdown_sections(rows: Sequence[Row]) -> str:
    """Every section's table and commands, then what it was measured with."""
    parts = []
    for section, title in SECTIONS.items():
        own = [row for row in rows if row["section"] == section]
        if own:
            commands = "\n".join(row["command"] for row in {row["command"]: row for row in own}.values())
            parts.append(f"### {title}\n\n{markdown(own)}\n\n```console\n{commands}\n```")
    return "\n\n".join([*parts, f"Measured with:\n\n{measured_with(rows)}"])
