"""A report that lists tokens says where each lies, by image and by frame, in a family whose images have any size."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.harness import engine
from tests.families.asking import ask, questions, settings
from tests.families.checkpoints import CHECKPOINTS
from vllm_hidrop.plan.grid import Grid, Tile

pytestmark = pytest.mark.engine


def test_the_grids_of_images_and_frames_are_in_the_report(checkpoint: Callable[[str], Path]) -> None:
    family = CHECKPOINTS["qwen2_5_vl"]
    with engine(checkpoint("qwen2_5_vl"), {"method": "fastv"}, **settings(family)) as running:
        one, two, text, video = ask(running, questions(family), hidrop_explain=True)[0]
    small, large, frame = (Grid((Tile(0, *size, size[0]),)).dump() for size in ((6, 4), (5, 7), (5, 4)))
    told = [[(each["item"], each["frame"], each["grid"]) for each in of.report["spans"]] for of in (one, two, video)]
    assert told == [
        [(0, None, small)],
        [(0, None, large), (1, None, small)],
        [(0, 0, frame), (0, 1, frame), (0, 2, frame)],
    ]
    assert text.report["spans"] == []
    for answer in (one, two, video):
        tokens = [span["tokens"] for span in answer.report["spans"]]
        assert [len(kept) for kept in answer.report["stages"][0]["patches"]] == tokens
