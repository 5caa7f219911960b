"""Grids of forms that no tiny checkpoint has, and of features that tell too little."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo
from vllm.model_executor.models.llava_onevision import LlavaOnevisionProcessingInfo
from vllm.multimodal.inputs import PlaceholderRange

from vllm_hidrop.engine.grids import spans_on_grids
from vllm_hidrop.models.idefics3 import Idefics3
from vllm_hidrop.models.internvl import InternVL, InternVLChat
from vllm_hidrop.models.llava import Llava
from vllm_hidrop.models.llava_next import LlavaNext, LlavaNextVideo
from vllm_hidrop.models.llava_onevision import LlavaOnevision
from vllm_hidrop.models.mistral3 import Mistral3
from vllm_hidrop.models.qwen_vl import Qwen2VL
from vllm_hidrop.plan.grid import Grid, Tile, square
from vllm_hidrop.plan.places import Span


def feature(
    length: int, modality: str = "image", offset: int = 7, mask: torch.Tensor | None = None, **data: torch.Tensor
) -> Any:
    position = PlaceholderRange(offset, length, mask)
    fields = {name: SimpleNamespace(data=value) for name, value in data.items()}
    return SimpleNamespace(mm_position=position, modality=modality, data=fields)


def llava_config(image_size: int, patch_size: int, tower: str = "clip_vision_model", **more: Any) -> Any:
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size, model_type=tower)
    return SimpleNamespace(vision_config=vision, vision_feature_select_strategy="default", **more)


def anyres_config(image_size: int, most: int) -> Any:
    steps = range(1, most + 1)
    return llava_config(
        image_size, 14, image_grid_pinpoints=[[image_size * i, image_size * j] for i in steps for j in steps]
    )


def test_llava_1_5_is_a_square_behind_its_class_token_and_cropped_where_the_tower_is_clip() -> None:
    config = llava_config(336, 14)
    assert Llava().grid(feature(576), config) == Grid((square(576),), is_cropped=True)
    assert Llava().grid(feature(729), llava_config(384, 14, "siglip_vision_model")) == Grid((square(729),))
    config.vision_feature_select_strategy = "full"
    assert Llava().grid(feature(577), config) == Grid((square(576, start=1),), is_cropped=True)
    assert Llava().grid(feature(100), config) is None, "features that a client sent"


@pytest.mark.parametrize(
    ("family", "info", "image_size", "most"),
    [(LlavaNext(), LlavaNextProcessingInfo, 336, 3), (LlavaOnevision(), LlavaOnevisionProcessingInfo, 384, 6)],
)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_unpadded_and_shrunk_rows_and_columns_are_as_many_as_vllm_counts(
    family: Any, info: Any, image_size: int, most: int, height: int, width: int
) -> None:
    config, side = anyres_config(image_size, most), image_size // 14
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, image_size)
    cells, newlines = info._get_num_unpadded_features(
        None,
        original_height=height,
        original_width=width,
        npatches=side,
        num_patch_height=rows,
        num_patch_width=columns,
    )
    grid = family.grid(feature(side**2 + cells + newlines, image_sizes=torch.tensor([height, width])), config)
    assert grid is not None
    (tile,) = grid.tiles
    assert (tile.rows, tile.columns * tile.rows, tile.stride) == (newlines, cells, tile.columns + 1)
    assert grid.whole == square(side**2)
    left, top, right, bottom = tile.box
    scale = min(rows * side / height, columns * side / width)
    assert abs(left) * width * scale <= 1, "a cell at the rim may show padding, or be left out"
    assert abs(top) * height * scale <= 1
    assert left + right == pytest.approx(1)
    assert top + bottom == pytest.approx(1)


def test_a_length_that_is_not_the_grids_has_none() -> None:
    config = anyres_config(336, 2)
    assert LlavaNext().grid(feature(2000, image_sizes=torch.tensor([300, 300])), config) is None
    assert LlavaNext().grid(feature(2000), config) is None, "features that a client sent have no size"


def test_pooled_frames_are_squares() -> None:
    video = feature(1000, "video")
    assert LlavaNextVideo().grid(video, llava_config(336, 14, spatial_pool_stride=2)) == Grid(
        (square(144),), is_cropped=True
    )
    assert LlavaOnevision().grid(video, llava_config(384, 14)) == Grid((square(196),))


def internvl_config(**more: Any) -> Any:
    return SimpleNamespace(
        force_image_size=None,
        downsample_ratio=0.5,
        vision_config=SimpleNamespace(image_size=448, patch_size=14),
        use_thumbnail=True,
        **more,
    )


def tiles_of(picture: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """What a processor makes of a picture [3, height, width]: tiles in reading order, and the picture in small."""

    def resized(height: int, width: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]

    large = resized(rows * side, columns * side)
    tiles = large.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([tiles, resized(side, side)[None]])


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (3, 4), (4, 3), (2, 6), (1, 12), (12, 1), (1, 7)])
def test_internvls_rows_of_tiles_are_seen_from_the_pixels(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    blobs = torch.rand(3, 9, 9, generator=generator)
    picture = torch.nn.functional.interpolate(blobs[None], (300, 400), mode="bicubic")[0]
    pixels = tiles_of(picture, rows, columns, 448).bfloat16()
    grid = InternVLChat().grid(feature(256 * len(pixels), pixel_values_flat=pixels), internvl_config())
    assert grid is not None
    assert grid.whole == square(256, 256 * rows * columns)
    assert len(grid.tiles) == rows * columns
    assert grid.tiles[-1].start == 256 * (rows * columns - 1)
    assert grid.tiles[-1].box == pytest.approx((1 - 1 / columns, 1 - 1 / rows, 1, 1))


def test_internvls_rows_of_tiles_are_not_guessed() -> None:
    config = internvl_config()
    even = torch.ones(5, 3, 448, 448)
    assert InternVLChat().grid(feature(5 * 256, pixel_values_flat=even), config) is None
    assert InternVLChat().grid(feature(5 * 256), config) is None, "features that a client sent"
    assert InternVLChat().grid(feature(256), config) == Grid((square(256),))
    assert InternVLChat().grid(feature(8 * 256, "video"), config) == Grid((square(256),))
    assert InternVLChat().grid(feature(256), internvl_config(ps_version="v1")) is None
    config.use_thumbnail = False
    assert InternVLChat().grid(feature(5 * 256, pixel_values_flat=even), config) is None
    tiles = torch.rand(2, 3, 448, 448)
    hugging_face = SimpleNamespace(image_seq_length=256)
    assert InternVL().grid(feature(2 * 256, pixel_values=tiles), hugging_face) == Grid((square(256),), square(256, 256))


def mask_of(*runs: int) -> torch.Tensor:
    """A run of text, one of embeddings, and so on, as long as named."""
    return torch.cat([torch.full((length,), index % 2 == 1) for index, length in enumerate(runs)])


def test_idefics3s_rows_of_tiles_begin_behind_longer_text() -> None:
    mask = mask_of(2, 64, 2, 64, 3, 64, 2, 64, 4, 64, 1)
    grid = Idefics3().grid(feature(len(mask), mask=mask), None)
    assert grid is not None
    assert [tile.start for tile in grid.tiles] == [0, 66, 133, 199]
    assert [tile.box for tile in grid.tiles[1:3]] == [(0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1)]
    assert grid.whole == square(64, 267)
    column = mask_of(2, 64, 3, 64, 3, 64, 4, 64, 1)
    stacked = Idefics3().grid(feature(len(column), mask=column), None)
    assert stacked is not None
    assert [tile.box[2:] for tile in stacked.tiles] == [(1, 1 / 3), (1, 2 / 3), (1, 1)]
    ragged = mask_of(2, 64, 2, 64, 3, 64, 3, 64, 1)
    assert Idefics3().grid(feature(len(ragged), mask=ragged), None) is None
    assert Idefics3().grid(feature(67, mask=mask_of(2, 64, 1)), None) == Grid((square(64),))


def test_mistrals_rows_are_runs_of_equal_length() -> None:
    mask = mask_of(0, 5, 1, 5, 1, 5, 1)
    assert Mistral3().grid(feature(len(mask), mask=mask), None) == Grid((Tile(0, 5, 3, 6),))
    mask = mask_of(0, 5, 1)
    assert Mistral3().grid(feature(len(mask), mask=mask), None) == Grid((Tile(0, 5, 1, 5),))
    mask = mask_of(0, 5, 1, 4, 1)
    assert Mistral3().grid(feature(len(mask), mask=mask), None) is None


def configured(family: type, config: Any) -> Any:
    path = f"{family.__module__}:{family.__qualname__}"
    additional = {"hidrop": {"resolved": {"family": path}}}
    return SimpleNamespace(additional_config=additional, model_config=SimpleNamespace(hf_config=config))


def test_spans_are_told_by_image_and_by_frame() -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    image = feature(24, offset=50, image_grid_thw=torch.tensor([1, 8, 12]))
    video = feature(40, "video", offset=3, video_grid_thw=torch.tensor([2, 8, 10]))
    lying = feature(6, offset=80, image_grid_thw=torch.tensor([1, 8, 12]))
    unknown = feature(6, offset=90)
    spans = [Span(3, 20, 0), Span(23, 20, 0), Span(50, 24, 1), Span(80, 6, 2), Span(90, 6, 3)]
    found = spans_on_grids(spans, [image, video, lying, unknown], configured(Qwen2VL, config))
    assert [(each["item"], each["frame"], each["tokens"]) for each in found] == [
        (0, 0, 20),
        (0, 1, 20),
        (1, None, 24),
        (2, None, 6),
        (3, None, 6),
    ]
    assert [each["grid"] for each in found] == [
        Grid((Tile(0, 5, 4, 5),)).dump(),
        Grid((Tile(0, 5, 4, 5),)).dump(),
        Grid((Tile(0, 6, 4, 6),)).dump(),
        None,
        None,
    ]
    assert found[2]["grid"]["tiles"] == [{"start": 0, "columns": 6, "rows": 4, "stride": 6, "box": [0, 0, 1, 1]}]
