"""The grid of a span names the token that changes when its part of the picture does, in Hugging Face's own model.

The tower's attention is switched off, so that a token sees the pixels of its own cell alone. Where tokens stand, and
what is known of a picture, is vLLM's processor's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tests.families.checkpoints import CHECKPOINTS
from tests.families.checkpoints.form import Size, TinyCheckpoint
from vllm_hidrop.models.families import family_of
from vllm_hidrop.plan.grid import Box, Grid
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.planner import spans_of

# transformers' processor of GLM-4V turns a list of tensors into an array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

FAMILIES = [
    name
    for name, family in CHECKPOINTS.items()
    if not (family.is_remote_code or name.endswith("_moe") or name == "qwen3_5")
]
WITH_IMAGES = [name for name in FAMILIES if CHECKPOINTS[name].image_sizes]
WITH_VIDEO = [name for name in FAMILIES if CHECKPOINTS[name].video]
ATTENTION_OUTPUTS = ("attn.proj", "attn.out_proj", "attention.o_proj", "attention.projection_layer", "attn.o_proj")
NUM_MARKS = 8


class Reached(Exception):
    """The first decoder layer, with what enters it."""


class Towers:
    """A checkpoint in Hugging Face's model without the tower's attention, and in vLLM's processor."""

    def __init__(self, directory: Path, family: TinyCheckpoint) -> None:
        self.family = family
        self.processor = AutoProcessor.from_pretrained(directory)
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
        outputs = [
            module
            for name, module in model.named_modules()
            if "vis" in name and name.endswith(ATTENTION_OUTPUTS) and isinstance(module, torch.nn.Linear)
        ]
        assert outputs, "no attention found in the tower"
        for module in outputs:
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        text = next(module for name, module in model.named_modules() if name.endswith("layers.0") and "vis" not in name)
        text.register_forward_pre_hook(self._stop, with_kwargs=True)
        self.model = model
        self.vllm_config = EngineArgs(str(directory), dtype="float32").create_model_config()
        self.vllm_processor = MULTIMODAL_REGISTRY.create_processor(self.vllm_config)

    @staticmethod
    def _stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    def grid(self, feature: Any) -> Grid | None:
        config = self.vllm_config.hf_config
        return family_of(config.architectures[0]).grid(feature, config)

    def feature(self, layout: str, media: dict[str, Any]) -> Any:
        """The one image or video of a prompt, as vLLM's scheduler has it."""
        items = self.vllm_processor.info.parse_mm_data(media)
        found = self.vllm_processor(self.family.prompt(layout), mm_items=items)
        (modality,) = found["mm_placeholders"]
        (position,), (data,) = found["mm_placeholders"][modality], found["mm_kwargs"][modality]
        return MultiModalFeatureSpec(data=data, modality=modality, identifier="", mm_position=position)

    def spans(self, feature: Any) -> list[Span]:
        config = self.vllm_config.hf_config
        return spans_of(feature, 0, family_of(config.architectures[0]).frame_tokens(config))

    def entering(self, layout: str, **media: Any) -> torch.Tensor:
        """What enters the decoder, [tokens, hidden size], of a prompt with one image or video."""
        text = " ".join(self.processor.tokenizer.convert_ids_to_tokens(self.family.prompt(layout)))
        inputs = self.processor(text=[text], return_tensors="pt", **media)
        with torch.no_grad(), pytest.raises(Reached) as reached:
            self.model(**inputs)
        entering: torch.Tensor = reached.value.args[0]
        return entering[0]

    def video_entering(self, frames: npt.NDArray[np.uint8]) -> torch.Tensor:
        assert self.family.video_shape is not None
        known = {key: value for key, value in self.family.video_shape.metadata().items() if key != "do_sample_frames"}
        return self.entering("3v2", videos=[frames], video_metadata=[known], do_sample_frames=False)


@pytest.fixture(scope="module")
def towers(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Towers]:
    def made(name: str) -> Towers:
        directory = tmp_path_factory.mktemp(name)
        copytree(checkpoint(name), directory, dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_tokens(
            ["\n"], special_tokens=True
        )  # a token in all real checkpoints, and read by Idefics3's grid
        tokenizer.save_pretrained(directory)
        return Towers(directory, CHECKPOINTS[name])

    return cache(made)


@dataclass(frozen=True)
class Cell:
    """A token's cell: its place in the span, the number of its tile, and its box in pixels."""

    token: int
    tile: int
    box: Box

    def holds(self, mark: Box) -> bool:
        return all(a <= b for a, b in zip(self.box[:2], mark[:2], strict=True)) and all(
            a >= b for a, b in zip(self.box[2:], mark[2:], strict=True)
        )

    def touches(self, mark: Box) -> bool:
        left, top, right, bottom = self.box
        return left < mark[2] and mark[0] < right and top < mark[3] and mark[1] < bottom


def cells_of(grid: Grid, size: Size) -> list[Cell]:
    """Every cell of a grid on a picture of ``size``."""
    width, height = size
    side = min(size)
    area = ((width - side) / 2, (height - side) / 2, side, side) if grid.is_cropped else (0, 0, width, height)
    cells = []
    for number, tile in enumerate([*grid.tiles, grid.whole] if grid.whole else grid.tiles):
        left, top, right, bottom = tile.box
        across, down = (right - left) / tile.columns, (bottom - top) / tile.rows
        for row in range(tile.rows):
            for column in range(tile.columns):
                x, y = left + column * across, top + row * down
                corners = ((x, y), (x + across, y + down))
                box = tuple(area[i] + area[i + 2] * corner[i] for corner in corners for i in (0, 1))
                cells.append(Cell(tile.start + row * tile.stride + column, number, box))  # type: ignore[arg-type]
    return cells


def marks_of(cells: list[Cell], size: Size, rng: np.random.Generator) -> list[tuple[Cell, Box]]:
    """Some cells with the pixels in their middle, as whole numbers."""
    marks = []
    for cell in rng.permutation(np.array(cells, dtype=object))[:NUM_MARKS]:
        left, top, right, bottom = cell.box
        inset = (right - left) / 4, (bottom - top) / 4
        mark = (
            max(0, round(left + inset[0])),
            max(0, round(top + inset[1])),
            min(size[0], max(round(right - inset[0]), round(left + inset[0]) + 1)),
            min(size[1], max(round(bottom - inset[1]), round(top + inset[1]) + 1)),
        )
        marks.append((cell, mark))
    return marks


def ground(size: Size) -> npt.NDArray[np.uint8]:
    """A picture in whose every part is something to see, softly, [height, width, 3]."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return np.stack([60 + 60 * x, 60 + 60 * y, 90 + 30 * x * y], axis=-1).astype(np.uint8)


def marked(pixels: npt.NDArray[np.uint8], mark: Box) -> npt.NDArray[np.uint8]:
    left, top, right, bottom = (int(side) for side in mark)
    changed = pixels.copy()
    changed[..., top:bottom, left:right, :] = 255
    return changed


def check(change: npt.NDArray[np.float32], cells: list[Cell], mark: Box) -> int:
    """Tile by tile, the cell that holds the mark changes most, far ones hardly; returns how many cells hold it."""
    most = float(change[[cell.token for cell in cells]].max())
    in_cells = np.zeros(len(change), dtype=np.bool_)
    num_holding = 0
    for tile in {cell.tile for cell in cells}:
        of_tile = [cell for cell in cells if cell.tile == tile]
        in_cells[[cell.token for cell in of_tile]] = True
        strongest = max(of_tile, key=lambda cell: float(change[cell.token]))
        holding = [cell for cell in of_tile if cell.holds(mark)]
        num_holding += len(holding)
        if holding:
            assert strongest == holding[0], (strongest, holding, mark)
        elif any(cell.touches(mark) for cell in of_tile):
            assert strongest.touches(mark), (strongest, mark)
        else:
            assert change[strongest.token] < 0.2 * most, (strongest, mark)
    assert not change[~in_cells].any(), "separators and text do not change"
    return num_holding


@pytest.mark.parametrize("which", [0, 1, (150, 70)])
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_token_that_a_cell_names_changes_with_the_pixels_in_the_cell(
    name: str, which: int | Size, towers: Callable[[str], Towers]
) -> None:
    tower = towers(name)
    size = CHECKPOINTS[name].image_sizes[which] if isinstance(which, int) else which
    pixels = ground(size)
    feature = tower.feature("3i2", {"image": [Image.fromarray(pixels)]})
    (span,) = tower.spans(feature)
    grid = tower.grid(feature)
    assert grid is not None
    assert grid.end <= span.length
    cells = cells_of(grid, size)
    assert len({cell.token for cell in cells}) == len(cells)
    plain = tower.entering("3i2", images=[Image.fromarray(pixels)])
    for cell, mark in marks_of(cells, size, np.random.default_rng(1)):
        picture = Image.fromarray(marked(pixels, mark))
        assert tower.grid(tower.feature("3i2", {"image": [picture]})) == grid
        change = (tower.entering("3i2", images=[picture]) - plain).abs().amax(-1).numpy()
        assert not change[: span.offset].any()
        assert not change[span.end :].any()
        assert check(change[span.offset : span.end], cells, mark) >= 1, (cell, mark)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_the_token_that_a_frames_cell_names_changes_with_the_pixels_in_the_cell(
    name: str, towers: Callable[[str], Towers]
) -> None:
    tower, shape = towers(name), CHECKPOINTS[name].video_shape
    assert shape is not None
    pixels = np.repeat(ground(shape.size)[None], shape.num_frames, axis=0)
    feature = tower.feature("3v2", {"video": [(pixels, shape.metadata())]})
    spans = tower.spans(feature)
    grid = tower.grid(feature)
    assert grid is not None
    cells = cells_of(grid, shape.size)
    frames = np.array_split(np.arange(shape.num_frames), len(spans))
    assert len({len(each) for each in frames}) == 1
    plain = tower.video_entering(pixels)
    rng = np.random.default_rng(1)
    for frame, span in enumerate(spans):
        assert grid.end <= span.length
        (_, mark), *_ = marks_of(cells, shape.size, rng)
        changed = pixels.copy()
        changed[frames[frame]] = marked(pixels[frames[frame]], mark)
        change = (tower.video_entering(changed) - plain).abs().amax(-1).numpy()
        assert not np.delete(change, np.arange(span.offset, span.end)).any(), "no other frame changes"
        assert check(change[span.offset : span.end], cells, mark) == 1
