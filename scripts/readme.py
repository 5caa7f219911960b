"""Fill the generated parts of README.md and docs/ from code and data; ``--check`` only compares (1: one is stale)."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from hidrop_server.metrics import METRICS
from vllm_hidrop.bench.rows import Row, read_rows
from vllm_hidrop.bench.tables import cells, markdown_sections, measured_with
from vllm_hidrop.cli import families
from vllm_hidrop.cli.app import app
from vllm_hidrop.cli.methods import about
from vllm_hidrop.config import HidropConfig
from vllm_hidrop.engine.gate import CHECKED, RULES
from vllm_hidrop.methods import METHODS, Method
from vllm_hidrop.plan.planner import REQUEST_KEYS

ROOT = Path(__file__).parents[1]
FIVE = (  # the README's rows of docs/bench.json; the fifth is accuracy, from docs/embedded_eval.json
    ("one image: time of the prefill", "prefill hidrop, 1 image + 64 text"),
    ("eight images: time of the prefill", "prefill hidrop, 8 images + 64 text"),
    ("one image: KV cache held", "kv hidrop, bytes held, 1 image + 64 text"),
    ("HTTP server, every request with an image", "serve hidrop, requests/s"),
)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def five_numbers(rows: Iterable[Row], accuracy: Mapping[str, Any]) -> str:
    """Table of four measured rows and the accuracy, and below it with what each was measured."""
    found = {row["name"]: row for row in rows}
    chosen = [(what, found[name]) for what, name in FIVE]
    lines = [[what, *cells(row)[1:4], f"`{row['command']}`"] for what, row in chosen]
    low, high = accuracy["intervals"]["retention"]
    command = f"`hidrop eval --embedded --limit {accuracy['questions']} --seed {accuracy['seed']}`"
    shares = [f"{accuracy[arm]:.1%}" for arm in ("dense", "hidrop")]
    lines.append(
        [
            "answers right, dense and HiDrop checkpoint",
            *shares,
            f"{accuracy['retention']:.3f}x ({low:.3f} to {high:.3f})",
            command,
        ]
    )
    versions = ", ".join(f"{name} {version}" for name, version in accuracy["versions"].items())
    return "\n\n".join(
        (
            table(("what", "stock vLLM", "HiDrop", "ratio", "printed by"), lines),
            "Measured with:",
            f"{measured_with([row for _, row in chosen])}\n"
            "- the last row: the two embedded checkpoints (12 layers x 128, trained on synthetic scenes), bfloat16,"
            f" {accuracy['questions']} questions; the same machine; {versions}; {accuracy['date'][:10]}",
        )
    )


def paper_link(method: type[Method]) -> str:
    """Markdown link to the paper; for a method without one, what it is."""
    found = re.fullmatch(r"arXiv (\S+)", method.paper)
    return f"[{method.paper}](https://arxiv.org/abs/{found[1]})" if found else method.paper.replace("-", "")


def catalogue() -> str:
    """One row per method."""
    rows = ([f"`{name}`", method.summary, paper_link(method)] for name, method in METHODS.items())
    return table(("method", "what it keeps", "paper"), rows)


def method_sections() -> str:
    """One section per method: its docstring, and its presets."""
    return "\n\n".join(_method_section(name, method) for name, method in METHODS.items())


def _method_section(name: str, method: type[Method]) -> str:
    presets = ", ".join(f"`{each}`{' (default)' * (each == method.default_preset)}" for each in method.presets)
    more = f"\n\n**Presets** {presets}." if presets else ""
    return f"## `{name}`\n\n{paper_link(method)}\n\n{about(method)}{more}".replace("\n\n\n\n", "\n\n")


def families_table() -> str:
    """One row per family: its parts, what is left out of methods, and the pairs that were run."""
    head = ("family", "tower", "text model: layers", "takes", "methods", "run with random weights", "with real weights")
    return table(head, map(_family_row, families.catalogue()))


def _family_row(row: Mapping[str, Any]) -> list[str]:
    left_out = [_left_out(name, each, row["towers"]) for name, each in row["left_out"].items()]
    return [
        f"{row['title']}, `{row['architecture']}`",
        _code(row["towers"]),
        ", ".join(f"`{text}`: {form}" for text, form in row["text_models"].items()),
        families.shown_media(row),
        "; ".join(("all", *left_out)),
        *(_code(pairs) or "no" for pairs in row["run"].values()),
    ]


def _left_out(method: str, part: Mapping[str, Any], towers: list[str]) -> str:
    where = "" if part["towers"] == towers else f" with {_code(part['towers'])}"
    return f"`{method}` without `{part['options']}`{where}"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def family_names() -> str:
    """One row per family, for the README."""
    rows = ([row["title"], families.shown_media(row), families.shown_runs(row)] for row in families.catalogue())
    return table(("family", "takes", "run on a CPU with"), rows)


def flags_as_code(text: str) -> str:
    """Put the flags of a line in backticks, unless the line has some."""
    return text if "`" in text else re.sub(r"--[\w.-]+", r"`\g<0>`", text)


def gate_tables() -> str:
    """One row per rule, then one per setting that works."""
    refused = table(("setting", "because"), ([flags_as_code(rule.setting), rule.reason] for rule in RULES))
    works = table(
        ("setting", "checked in `tests/engine` by"),
        ([flags_as_code(each.setting), f"`{each.test.replace('::', '` `')}`"] for each in CHECKED),
    )
    return f"## Settings refused at start\n\n{refused}\n\n## Settings that work\n\n{works}"


def metrics_table() -> str:
    """One row per metric."""
    rows = (
        [f"`{spec.shown}`", spec.kind, ", ".join(f"`{label}`" for label in spec.labels), spec.help] for spec in METRICS
    )
    return table(("metric", "type", "labels of its own", "meaning"), rows)


def choice_keys() -> str:
    """One row per key of ``--hidrop-config``."""
    fields = HidropConfig.model_fields.items()
    return table(("key", "meaning"), ([f"`{name}`", field.description or ""] for name, field in fields))


def request_keys() -> str:
    """One row per key of ``vllm_xargs``."""
    return table(("key", "meaning"), ([f"`{name}`", meaning] for name, meaning in REQUEST_KEYS.items()))


def commands() -> str:
    """Every command with its help, as Typer writes it, below the page's own heading."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="hidrop"), name="hidrop")
    return text.partition("\n")[2].strip()


def fill(text: str, part: str, content: str) -> str:
    """Put ``content`` between the markers of ``part``."""
    pattern = re.compile(rf"(<!-- {part}:begin[^>]*-->\n).*?(<!-- {part}:end -->)", re.DOTALL)
    filled, times = pattern.subn(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)
    if times != 1:
        raise ValueError(f"the markers of {part} are there {times} times")
    return filled


def main() -> int:
    """Write the files, or check them."""
    rows = read_rows(ROOT / "docs" / "bench.json")
    accuracy = json.loads((ROOT / "docs" / "embedded_eval.json").read_text(encoding="utf-8"))
    parts = {
        "README.md": {
            "numbers": five_numbers(rows, accuracy),
            "methods": catalogue(),
            "families": family_names(),
        },
        "docs/performance.md": {"numbers": markdown_sections(rows)},
        "docs/metrics.md": {"metrics": metrics_table()},
        "docs/methods.md": {"methods": method_sections()},
        "docs/families.md": {"families": families_table()},
        "docs/limits.md": {"gate": gate_tables()},
        "docs/serving.md": {"choice": choice_keys(), "request": request_keys()},
        "docs/commands.md": {"commands": commands()},
    }
    stale = []
    for name, contents in parts.items():
        file = ROOT / name
        old = new = file.read_text(encoding="utf-8")
        for part, content in contents.items():
            new = fill(new, part, content)
        if new != old:
            stale.append(name)
        if "--check" not in sys.argv:
            file.write_text(new, encoding="utf-8")
    print("\n".join(stale), file=sys.stderr)
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
