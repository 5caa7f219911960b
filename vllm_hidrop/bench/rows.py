"""Rows: measured figures as plain data, keyed as in :func:`make_row` and :func:`provenance`; ``--json`` writes them."""

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from vllm_hidrop.bench.shapes import SHAPES
from vllm_hidrop.outputs import write_file

Row = dict[str, Any]
HIGHER_IS_BETTER = ("requests/s", "requests")  # units of which more is better; of all others (ms, s, MiB) less is
SECTIONS = {  # in the order they are printed
    "prefill": "Prefill of one prompt: time of its step, vision tower included",
    "burst": "Requests that arrive at once, until each has its first token",
    "prefix": "One image, two questions, prefix caching on: time of the step that answers each",
    "decode": "Decode: time of a step",
    "kv": "KV cache",
    "serve": "HTTP: vLLM's own benchmark against both servers",
    "start": "Start of the engine",
}


def ratio(ours: float, stock: float, unit: str) -> float:
    """How many times better ours is: stock/ours of times and sizes, ours/stock of rates and counts."""
    return ours / stock if unit in HIGHER_IS_BETTER else stock / ours


def make_row(section: str, name: str, figures: tuple[float, float], unit: str, ideal: float | None, **more: Any) -> Row:
    """A row of (stock, ours) figures; ``ideal``: the ratio if all else cost nothing, ``more``: keys of its section."""
    stock, ours = figures
    better = ratio(ours, stock, unit)
    return {"section": section, "name": name, "ours": ours, "stock": stock, "ratio": better} | {
        "ideal_ratio": ideal,
        "unit": unit,
        **more,
    }


def provenance(shape: str, mode: str) -> Row:
    """The keys that say with what and when a row was measured."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(errors="replace"))
    return {
        "shape": shape,
        "mode": mode,
        "cpu": names[0] if names else "unknown CPU",
        "date": str(date.today()),
        "versions": versions(),
    }


def versions() -> dict[str, Any]:
    """Versions of everything that matters to speed, and the machine."""
    import torch

    from vllm_hidrop import __version__
    from vllm_hidrop.engine.compat import installed_vllm_version

    found: dict[str, Any] = {
        "vllm_hidrop": __version__,
        "vllm": installed_vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def hardware(row: Row) -> str:
    """Model, machine and versions of a row, in one line."""
    about = row["versions"]
    machine = f"{row['cpu']}, {about['cpus']} cores, {about.get('gpu', 'no GPU')}"
    return (
        f"{SHAPES[row['shape']]} ({row['shape']!r}), random weights, bfloat16; {machine}; "
        f"vLLM {about['vllm']}, torch {about['torch']}, Python {about['python']}, "
        f"vllm_hidrop {about['vllm_hidrop']}; {row['date']}"
    )


def read_rows(file: Path) -> list[Row]:
    """Read rows written by :func:`write_rows`."""
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list."""
    write_file(file, json.dumps(rows, indent=2) + "\n")
