"""Every table of the Markdown files is one that a reader sees as a table: whole, with as many cells in every row."""

import re
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.as_posix()
    for path in (found.relative_to(ROOT) for found in ROOT.rglob("*.md"))
    if not path.parts[0].startswith(".")
)
DELIMITERS = re.compile(r"\|(\s*:?-+:?\s*\|)+")
CELL_ENDS = re.compile(r"(?<!\\)\|")


def table_faults(text: str) -> list[str]:
    """What is wrong with the tables of a Markdown text, one line each; code blocks hold none."""
    faults = []
    fence = ""
    numbered = []
    for number, line in enumerate(text.splitlines(), 1):
        found = re.match(r"\s*(```+|~~~+)", line)
        if found and not fence:
            fence = found[1]
        elif found and found[1].startswith(fence):
            fence = ""
        numbered.append((number, "" if fence or found else line.strip()))
    for is_table, lines in groupby(numbered, key=lambda each: each[1].startswith("|")):
        if is_table:
            faults += _faults_of(list(lines))
    return faults


def _faults_of(table: list[tuple[int, str]]) -> list[str]:
    first = table[0][0]
    if len(table) < 2 or not DELIMITERS.fullmatch(table[1][1]):
        return [f"line {first}: rows without a head: a table is split, or its second line is none of dashes"]
    cells = [(number, len(CELL_ENDS.findall(line)) - 1) for number, line in table]
    columns = cells[0][1]
    unlike = [f"line {number}: {count} cells under {columns} columns" for number, count in cells if count != columns]
    return unlike + [f"line {number}: the last cell has no end" for number, line in table if not line.endswith("|")]


@pytest.mark.parametrize("name", FILES)
def test_no_table_is_split_or_has_rows_of_differing_lengths(name: str) -> None:
    assert table_faults((ROOT / name).read_text(encoding="utf-8")) == []


HEAD = "| a | b |\n|---|:-:|\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (HEAD + "| 1 | 2 |\n\n| 3 | 4 |\n", "line 5: rows without a head"),
        (HEAD + "| 1 | 2 |\nwords\n| 3 | 4 |\n", "line 5: rows without a head"),
        ("| a | b |\n| 1 | 2 |\n", "line 1: rows without a head"),
        (HEAD + "| 1 |\n", "line 3: 1 cells under 2 columns"),
        (HEAD + "| 1 | `x | y` |\n", "line 3: 3 cells under 2 columns"),
        (HEAD + "| 1 | 2 | 3\n", "line 3: the last cell has no end"),
        ("| a | b |\n|---|\n", "line 2: 1 cells under 2 columns"),
    ],
)
def test_the_check_finds(text: str, fault: str) -> None:
    (found,) = table_faults(text)
    assert found.startswith(fault)


def test_the_check_passes_tables_with_escaped_bars_and_bars_in_code_blocks() -> None:
    assert table_faults(HEAD + r"| 1 | `x \| y` |" + "\n\nwords\n\n```\n| not a table\n```\n") == []
