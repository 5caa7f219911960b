"""``hidrop bench``: the settings that every measurement against stock vLLM shares, and how its rows are reported."""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_hidrop.bench.figure import check_drawable, draw
from vllm_hidrop.bench.rows import Row, provenance, ratio, write_rows
from vllm_hidrop.bench.shapes import SHAPES, make_checkpoint
from vllm_hidrop.bench.tables import print_rows
from vllm_hidrop.cli import costing
from vllm_hidrop.cli.media import image
from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.plan.costs import RequestCosts
from vllm_hidrop.terminal import Terminal

BLOCK_SIZE = 32
TOKENS_PER_IMAGE = 576
TRAFFIC = {"image": "", "off": " off", "text": " text only"}  # suffixes of row names: pruned, all kept, no image
DEFAULT_PRESETS = {"hidrop": "tok48", "mustdrop": "tok64"}
SCALED = ("hidrop", "visipruner", "mustdrop")  # their presets are for other depths than the bench shapes have


def complete_choice(method: str, preset: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """A pruning choice completed by the bench's default preset and scaling."""
    preset = preset or DEFAULT_PRESETS.get(method)
    scale = {"scale": True} if method in SCALED else {}
    return {"method": method, "options": scale | options} | ({"preset": preset} if preset else {})


TOK48 = complete_choice("hidrop", None, {})


@dataclass(frozen=True)
class Bench:
    """The settings that all measurements of a run share."""

    shape: str  # a name in ``bench.shapes.SHAPES``
    runs: int  # paired runs per figure; long measurements get fewer
    pairs: int  # fresh pairs of processes; the median of their medians counts
    compiled: bool  # vLLM's default; otherwise ``enforce_eager`` for both engines
    hidrop: dict[str, Any]  # the pruning choice, as HidropConfig takes it
    dummy: bool = False  # both engines make their weights up as they load: no file of gigabytes

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; known: {', '.join(SHAPES)}")

    @cached_property
    def model(self) -> Path:
        """Directory of the checkpoint, written when it is missing."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm_hidrop"
        name = f"bench-{self.shape}" + ("-dummy" if self.dummy else "")
        return make_checkpoint(SHAPES[self.shape], cache / name, weights=not self.dummy)

    @cached_property
    def known(self) -> costing.Model:
        """Layer sizes and tokens per image of the model."""
        return costing.read_model(str(self.model))

    @cached_property
    def resolved(self) -> Resolved:
        """The method and its schedule. Raises ValueError: a choice that does not exist or does not fit."""
        return resolve(HidropConfig.parse(self.hidrop), ModelShape(SHAPES[self.shape].num_layers, TOKENS_PER_IMAGE))

    @property
    def method(self) -> str:
        """Name of the pruning method."""
        return str(self.hidrop["method"])

    def name(self, section: str, traffic: str, what: str) -> str:
        """Name of a row; compiled, vLLM's default mode, is not mentioned."""
        return f"{section} {self.method}{TRAFFIC[traffic]}, {what}{'' if self.compiled else ', eager'}"

    def costs(self, images: int, text: int, decided: Sequence[int] | None = None) -> RequestCosts:
        """Calculated costs of a pruned request; ``decided``: vision tokens per stage, where the method decides them."""
        workload = costing.Workload((image(TOKENS_PER_IMAGE),) * images, text, BLOCK_SIZE)
        return costing.request_costs(self.known, self.resolved, workload, decided)

    def command(self, section: str, **flags: Any) -> str:
        """The command line that measures one row alone."""
        words = ["hidrop", "bench", section]
        given: dict[str, Any] = {**flags, "shape": self.shape}
        if section != "kv":  # counted, not timed
            given["runs"] = self.runs
        if self.pairs > 1:
            given["pairs"] = self.pairs
        if self.method != "hidrop":
            given["method"] = self.method
        usual = complete_choice(self.method, None, {})
        if self.hidrop.get("preset") != usual.get("preset"):
            given["preset"] = self.hidrop["preset"]
        if self.hidrop["options"] != usual["options"]:
            given["options"] = json.dumps(self.hidrop["options"])
        for key, value in given.items():
            words += [f"--{key}", str(value)]
        return shlex.join(words + ([] if self.compiled else ["--eager"]))

    def settings(
        self,
        max_model_len: int,
        step_tokens: int,
        kv_bytes: int,
        *,
        max_num_seqs: int = 64,
        prefix_caching: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Engine settings of (stock, ours), which differ in model class and pruning choice only."""
        stock = {
            "model": str(self.model),
            "dtype": "bfloat16",
            "enforce_eager": not self.compiled,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": step_tokens,
            "max_num_seqs": max_num_seqs,
            "block_size": BLOCK_SIZE,
            "enable_prefix_caching": prefix_caching,
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": kv_bytes,
            "limit_mm_per_prompt": {"image": 16},
        } | ({"load_format": "dummy"} if self.dummy else {})
        ours = stock | {
            "hf_overrides": {"architectures": ["HidropLlavaForConditionalGeneration"]},
            "additional_config": {"hidrop": self.hidrop},
        }
        return stock, ours

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of a pool with ample room for so many tokens in every layer, padding of groups included."""
        text = self.known.text
        return (1 << 27) + 5 * num_tokens * text.num_layers * text.kv_bytes_per_row // 4


def report(
    bench: Bench, rows: Callable[[Progress], Iterable[Row]], json_file: Path | None, png_file: Path | None
) -> None:
    """Measure, print, write the files asked for. Raises ValueError before anything starts: it cannot be measured."""
    if png_file is not None:
        check_drawable()
    assert bench.resolved  # refuses a bad choice before any engine starts
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    found: list[Row] = []
    try:
        with Progress(*columns, TimeElapsedColumn(), console=Terminal(stderr=True)) as progress:
            for row in rows(progress):
                found.append(row)
    finally:
        _report(found, json_file)
    if png_file is not None:
        draw(found, png_file)


def _report(found: Sequence[Row], json_file: Path | None) -> None:
    """Print the rows, then write them even if printing fails."""
    if not found:
        return
    try:
        print_rows(found)
    finally:
        if json_file is not None:
            write_rows(json_file, found)


def finished(bench: Bench, rows_of_pairs: Iterable[Sequence[Row]]) -> list[Row]:
    """One row per figure: the median over the pairs, and when and with what it was measured."""
    return [_merged(rows) | provenance(bench.shape, _mode(bench)) for rows in zip(*rows_of_pairs, strict=True)]


def _merged(rows: Sequence[Row]) -> Row:
    stock, ours = (median(row[who] for row in rows) for who in ("stock", "ours"))
    better = ratio(ours, stock, rows[0]["unit"])
    more = {"pair_ratios": [row["ratio"] for row in rows]} if len(rows) > 1 else {}
    return {**rows[0], "ours": ours, "stock": stock, "ratio": better} | more


def _mode(bench: Bench) -> str:
    return "compiled" if bench.compiled else "eager"
