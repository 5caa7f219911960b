"""Selecting rows of many images at once: for each the same as alone."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_hidrop.methods.scoring import select_top
from vllm_hidrop.staged.selection import select_rows

SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, float("inf"), float("-inf"), float("nan")])


@st.composite
def images(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Scores with ties and values that are no numbers; sizes alike in a part of the examples."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    if draw(st.booleans()):
        sizes = sizes[:1] * len(sizes)
    keeps = [draw(st.integers(1, size)) for size in sizes]
    if draw(st.booleans()):
        keeps = [min(keeps)] * len(sizes)
    scores = [torch.tensor(draw(st.lists(SCORES, min_size=size, max_size=size))) for size in sizes]
    return scores, keeps, [draw(st.integers(0, 10_000)) for _ in sizes]


@given(images())
def test_each_image_keeps_what_it_would_keep_alone(drawn: tuple[list[torch.Tensor], list[int], list[int]]) -> None:
    scores, keeps, first_rows = drawn
    alone = [select_top(each, keep) + first for each, keep, first in zip(scores, keeps, first_rows, strict=True)]
    assert select_rows(scores, keeps, first_rows).tolist() == torch.cat(alone).tolist()


def test_ties_go_to_the_lowest_index_in_images_of_real_size() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (8, 576)).astype(np.float32))
    chosen = select_rows(list(scores), [87] * 8, [0] * 8).view(8, 87)
    for each, kept in zip(scores, chosen, strict=True):
        assert kept.tolist() == sorted(sorted(range(576), key=lambda row: (-float(each[row]), row))[:87])
