"""``hidrop calibrate``: measure a model's layers and propose HiDrop's or VisiPruner's numbers for it."""

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
from vllm_hidrop.plan.schedule import Keep, KeepValue
from vllm_hidrop.terminal import Terminal

if TYPE_CHECKING:
    from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint
    from vllm_hidrop.lab.calibrate.contributions import Readings
    from vllm_hidrop.lab.calibrate.curves import Curves, Settings
    from vllm_hidrop.lab.calibrate.proposal import Proposal
    from vllm_hidrop.lab.calibrate.samples import Sample
    from vllm_hidrop.lab.calibrate.thresholds import VisiPrunerProposal

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
class VisiPrunerWish:
    """VisiPruner's numbers wanted: a keep as users write it, the tolerance, and whether its layers are to be fixed."""

    keep: str
    tolerance: float
    is_fixed: bool


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
    """Measure, propose HiDrop's schedule, print, write; curves even without a schedule.

    Raises ValueError: bad input, or no schedule fits.
    """
    output.check()
    from vllm_hidrop.lab.calibrate.curves import check_settings, measure

    samples, checkpoint = _inputs(model, data, device)
    check_settings(settings, checkpoint.num_layers)
    curves = measure(checkpoint, samples, settings)
    proposal = None
    try:
        proposal = _propose(checkpoint, curves, wish, settings)
        config, notes = _config(checkpoint, "hidrop", proposal.options(), f"{curves.num_samples} samples")
        _print(curves, proposal, config, [*proposal.boundaries.notes, *notes, *_size_notes(curves.vision_tokens)])
    finally:
        _write_curves(curves, proposal, output, f"{model}, {curves.num_samples} samples of {data.source}")
    if output.json_file is not None:
        write_file(output.json_file, json.dumps(config, indent=2) + "\n")


def run_visipruner(
    model: str, data: Data, wish: VisiPrunerWish, output: Output, max_answer_tokens: int, device: str
) -> None:
    """Measure, propose VisiPruner's numbers, print, write. Raises ValueError: bad input, or a model too shallow."""
    output.check()
    if output.png_file is not None:
        raise ValueError("--png draws HiDrop's curves; VisiPruner's are in the file beside --json")
    from vllm_hidrop.lab.calibrate.contributions import read
    from vllm_hidrop.lab.calibrate.thresholds import propose_visipruner

    keep = Keep.parse(_keep_value(wish.keep))
    samples, checkpoint = _inputs(model, data, device)
    readings = read(checkpoint, samples, keep, max_answer_tokens)
    num_tokens = readings.vision_tokens[1]
    if not checkpoint.family.is_dynamic:
        keep = Keep(count=max(1, keep.resolve(num_tokens)))
    proposal = propose_visipruner(readings, keep, wish.tolerance, num_tokens)
    num_samples = len(readings.contributions)
    options = proposal.options(wish.is_fixed)
    config, notes = _config(checkpoint, "visipruner", options, f"{num_samples} samples")
    _print_visipruner(readings, proposal, config, [*proposal.notes, *notes, *_size_notes(readings.vision_tokens)])
    if output.json_file is not None and output.curves_file is not None:
        write_file(output.curves_file, json.dumps(readings.as_json(), indent=2) + "\n")
        write_file(output.json_file, json.dumps(config, indent=2) + "\n")


def _inputs(model: str, data: Data, device: str) -> "tuple[Iterator[Sample], Checkpoint]":
    from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint
    from vllm_hidrop.lab.calibrate.samples import read_samples, take

    samples = take(read_samples(data.source, data.images, data.seed), data.num_samples, data.source)
    checkpoint = Checkpoint(_embedded_directory() if model == EMBEDDED else model, device)
    return _with_progress(samples, data.num_samples), checkpoint


def _keep_value(text: str) -> KeepValue:
    """What a command line's text says: a count, a fraction, or a share."""
    try:
        return int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        return text


def _embedded_directory() -> str:
    from vllm_hidrop.embedded import MODEL_DIR

    return str(MODEL_DIR)


def _with_progress(samples: "Iterator[Sample]", count: int) -> "Iterator[Sample]":
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as progress:
        yield from progress.track(samples, total=count, description="samples")


def _propose(checkpoint: "Checkpoint", curves: "Curves", wish: Wish, settings: "Settings") -> "Proposal":
    from vllm_hidrop.lab.calibrate.proposal import propose

    lines = {
        "vision_intra": curves.vision_intra,
        "cross": curves.cross,
        "agreement": curves.agreement,
        "ilvas": curves.ilvas[settings.windows[0]],
    }
    shape = ModelShape(checkpoint.num_layers, curves.vision_tokens[1], checkpoint.family.is_dynamic)
    return propose(lines, shape, wish.budget, wish.exit_tolerance, wish.num_filters)


def _write_curves(curves: "Curves", proposal: "Proposal | None", output: Output, title: str) -> None:
    if output.curves_file is not None:
        write_file(output.curves_file, json.dumps(curves.as_json(), indent=2) + "\n")
    if output.png_file is not None:
        from vllm_hidrop.lab.calibrate.figure import draw

        draw(curves.as_json(), proposal, title, output.png_file)


def _config(
    checkpoint: "Checkpoint", method: str, options: dict[str, Any], measured: str
) -> tuple[dict[str, Any], list[str]]:
    """The server's configuration, checked as at its start, and notes for the user."""
    from vllm_hidrop.engine.model_checks import fitted_to_model

    note = f"proposed by hidrop calibrate from {measured}; not published, and not tried on a benchmark"
    config: dict[str, Any] = {"method": method, "options": options, "note": note}
    notes = [note]
    family, trained = checkpoint.family, getattr(checkpoint.config, "hidrop", None)
    shape = family.shape(checkpoint.config)
    try:
        resolved = resolve(HidropConfig.parse(config), shape, trained)
    except ValueError:
        if not trained or trained.get("method") != method:
            raise
        config["force"] = True
        resolved = resolve(HidropConfig.parse(config), shape, trained)
        notes.append('this checkpoint was trained for another schedule: "force" is set')
    fitted_to_model(resolved, family, checkpoint.config)
    return config, notes


def _size_notes(vision_tokens: tuple[int, int, int]) -> list[str]:
    least, median, most = vision_tokens
    if least == most:
        return []
    return [f"images have {least} to {most} vision tokens; counts are shares of {median}, the median"]


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


def _print_visipruner(
    readings: "Readings", proposal: "VisiPrunerProposal", config: dict[str, Any], notes: list[str]
) -> None:
    table = Table(
        title=f"Readings of {len(readings.contributions)} samples, layers zero-based",
        caption="Answer tokens unchanged when layers up to this one are quiet, it decides, or vision ends at it.",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for heading in ("Layer", "Quiet", "Cut", "Exit", "Least cosine", "VisiPruner"):
        table.add_column(heading, justify="right", no_wrap=True)
    signs = {proposal.shallow_layers - 1: "last quiet", proposal.filter_layer: "decides", proposal.exit_layer: "exit"}
    least = [min(layers) for layers in zip(*readings.least_cosines(), strict=True)]
    for layer, cosine in enumerate(least):
        lines = (readings.quiet, readings.cut, readings.agreement)
        values = [line[layer] if layer < len(line) else None for line in lines]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(str(layer), *cells, f"{cosine:.6f}", signs.get(layer, ""))
    console = Terminal()
    console.show(table)
    console.print("\n".join(f"Note: {note}" for note in notes), highlight=False, soft_wrap=True)
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
