"""``hidrop convert``: runs `vllm_hidrop.lab.convert` with a progress bar."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_hidrop.terminal import Terminal

if TYPE_CHECKING:
    from vllm_hidrop.lab.convert.conversion import Conversion


def run(
    source: Path,
    destination: Path,
    preset: str | None,
    schedule: Mapping[str, Any] | None,
    vision_tower: Path | None,
) -> None:
    """Convert a checkpoint. Raises ValueError: not convertible, or no PyTorch; OSError: reading or writing failed."""
    try:
        from vllm_hidrop.lab.convert.conversion import prepare
    except ImportError as error:
        raise ValueError(
            f"convert needs PyTorch, safetensors and transformers ({error}); install the extra cpu"
        ) from error
    _convert(prepare(source, destination, preset, vision_tower, schedule=schedule))


def _convert(conversion: "Conversion") -> None:
    console = Terminal(stderr=True, soft_wrap=True, highlight=False)
    for warning in conversion.warnings:
        console.print(f"hidrop: warning: {warning}", markup=False)
    columns = (TextColumn("hash and write"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("convert", total=conversion.num_bytes)
        summary = conversion.run(lambda num_bytes: progress.update(task, advance=num_bytes))
        progress.update(task, completed=conversion.num_bytes)
    for name in summary.repaired:
        console.print(f"hidrop: {name} was not as it had been written; written again", markup=False)
    counts = f"{len(summary.written) + len(summary.repaired)} shards written, {len(summary.verified)} verified"
    print(f"{conversion.destination}: preset {conversion.preset}, {counts}")
