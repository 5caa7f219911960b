"""``hidrop calibrate``: measure a model's layers and propose a HiDrop schedule for it."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.outputs import check_file, write_file
from vllm_hidrop.terminal import Terminal

if TYPE_CHECKING:
    from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint
    from vllm_hidrop.lab.calibrate.curves import Curves, Settings
    from vllm_hidrop.lab.calibrate.proposal import Proposal
    from vllm_hidrop.lab.calibrate.samples import Sample

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Data:
    """The samples: "synthetic" or a file, its image folder, how many, and the seed of the scenes."""

    source: str
    images: Path | None
    num_samples: int
    seed: int


@dataclass(frozen=True)
class Wish:
    """The schedule wanted: mean vision tokens per layer, number of filters, agreement that an exit may lose."""

    budget: float
    num_filters: int
    exit_tolerance: float


@dataclass(frozen=True)
class Output:
    """Files to write; None where not wanted."""

    json_file: Path | None
    png_file: Path | None

    def check(self) -> None:
        """Check early that all can be written. Raises OSError: a file cannot; ValueError: matplotlib is missing."""
        if self.curves_file is not None:
            check_file(self.curves_file)
        if self.png_file is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError('--png needs matplotlib: pip install "vllm-hidrop[train]"')

    @property
    def curves_file(self) -> Path | None:
        """The curves, beside the configuration file, which holds only what the server accepts."""
        return self.json_file.with_suffix(".curves.json") if self.json_file else None


def run(model: str, data: Data, wish: Wish, output: Output, settings: "Settings", device: str) -> None:
    """Measure, propose, print, write; curves even without a schedule. Raises ValueError: bad input, or none fits."""
    output.check()
    from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint
    from vllm_hidrop.lab.calibrate.curves import check_settings, measure
    from vllm_hidrop.lab.calibrate.samples import read_samples, take

    samples = take(read_samples(data.source, data.images, data.seed), data.num_samples, data.source)
    checkpoint = Checkpoint(_embedded_directory() if model == EMBEDDED else model, device)
    check_settings(settings, checkpoint.num_layers)
    curves = measure(checkpoint, _with_progress(samples, data.num_samples), settings)
    proposal = None
    try:
        proposal = _propose(curves, wish, settings)
        config, note = _config(proposal, getattr(checkpoint.config, "hidrop", None))
        _print(curves, proposal, config, [*proposal.boundaries.notes, *note, *_notes(checkpoint, curves)])
    finally:
        _write_curves(curves, proposal, output, f"{model}, {curves.num_samples} samples of {data.source}")
    if output.json_file is not None:
        write_file(output.json_file, json.dumps(config, indent=2) + "\n")


def _embedded_directory() -> str:
    from vllm_hidrop.embedded import MODEL_DIR

    return str(MODEL_DIR)


def _with_progress(samples: "Iterator[Sample]", count: int) -> "Iterator[Sample]":
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as progress:
        yield from progress.track(samples, total=count, description="samples")


def _propose(curves: "Curves", wish: Wish, settings: "Settings") -> "Proposal":
    from vllm_hidrop.lab.calibrate.proposal import propose

    lines = {
        "vision_intra": curves.vision_intra,
        "cross": curves.cross,
        "agreement": curves.agreement,
        "ilvas": curves.ilvas[settings.windows[0]],
    }
    return propose(lines, curves.vision_tokens[1], wish.budget, wish.exit_tolerance, wish.num_filters)


def _write_curves(curves: "Curves", proposal: "Proposal | None", output: Output, title: str) -> None:
    if output.curves_file is not None:
        write_file(output.curves_file, json.dumps(curves.as_json(), indent=2) + "\n")
    if output.png_file is not None:
        from vllm_hidrop.lab.calibrate.figure import draw

        draw(curves.as_json(), proposal, title, output.png_file)


def _config(proposal: "Proposal", trained: dict[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """The server's configuration, and a note where the checkpoint was trained for another schedule."""
    config: dict[str, Any] = {"method": "hidrop", "options": proposal.options()}
    shape = ModelShape(*proposal.shape)
    if not trained or trained.get("method") != "hidrop":
        resolve(HidropConfig.parse(config), shape, trained)
        return config, []
    try:
        resolve(HidropConfig.parse(config), shape, trained)
    except ValueError:
        config["force"] = True
        resolve(HidropConfig.parse(config), shape, trained)
        return config, ['this checkpoint was trained for another schedule: "force" is set']
    return config, []


def _notes(checkpoint: "Checkpoint", curves: "Curves") -> list[str]:
    from vllm_hidrop.models.families import hidrop_architecture

    notes = []
    least, median, most = curves.vision_tokens
    if least != most:
        notes.append(f"images have {least} to {most} vision tokens; the counts are written for {median}, the median")
    architecture = type(checkpoint.model).__name__
    if hidrop_architecture(architecture) is None:
        notes.append(f"{architecture} cannot be served staged yet; the schedule is for when it can")
    return notes


def _print(curves: "Curves", proposal: "Proposal", config: dict[str, Any], notes: list[str]) -> None:
    table = Table(
        title=f"Curves of {curves.num_samples} samples, layers one-based",
        caption="n = ILVAS windows. Exit: answer tokens unchanged with no vision from this layer on; Right: answers.",
        box=SIMPLE_HEAD,
        padding=0,
    )
    windows = (f"n={window}" for window in curves.ilvas)
    for heading in ("Layer", "Vision", "Text", "Cross", *windows, "Exit", "Right", "Kept", "Schedule"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in range(1, len(curves.cross) + 1):
        table.add_row(*_cells(curves, layer), *_schedule_cells(proposal, layer))
    console = Terminal()
    console.show(table)
    num_tokens = proposal.shape[1]
    mean = proposal.schedule().mean_kept(num_tokens)
    told = f"Mean vision tokens per layer: {mean:.2f} of {num_tokens}"
    console.print("\n".join([told, *(f"Note: {note}" for note in notes)]), highlight=False, soft_wrap=True)
    console.print(json.dumps(config), highlight=False, soft_wrap=True, markup=False)


def _cells(curves: "Curves", layer: int) -> Iterator[str]:
    lines = (curves.vision_intra, curves.text_intra, curves.cross, *curves.ilvas.values(), curves.agreement)
    yield str(layer)
    for line in (*lines, curves.accuracy or []):
        yield f"{line[layer - 1]:.3f}" if layer <= len(line) else ""


def _schedule_cells(proposal: "Proposal", layer: int) -> tuple[str, str]:
    """Vision tokens of a layer, and what happens there: a filter stands behind its layer."""
    where, schedule = proposal.boundaries, proposal.schedule()
    kept = schedule.kept(proposal.shape[1])[schedule.stage_of_layer(layer - 1)]
    signs = ((where.inject_layer, "inject"), (where.exit_layer, "exit"))
    words = [word for at, word in signs if at == layer] + ["filter"] * (layer in proposal.filter_layers)
    return str(kept), " ".join(words)
