"""Which sizes of images are asked with, and where an image stands; no engine runs."""

import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from vllm_hidrop.methods import ModelShape
from vllm_hidrop.verify.cases import IMAGE, Model, Served
from vllm_hidrop.verify.prompts import choose_sizes, span_of

A, B, C = (96, 64), (224, 224), (448, 336)


@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        ({A: 24, B: 192, C: 240}, (B, C)),  # of those with enough tokens the fewest
        ({A: 24, B: 64, C: 60}, (C, B)),  # too few in all: the most
        ({A: 24, B: 24, C: 300}, (A, C)),
        ({A: 576, B: 576, C: 576}, (A, A)),  # a family with images of one size
    ],
)
def test_two_sizes_have_few_tokens_but_not_too_few(
    num_tokens: dict[tuple[int, int], int], sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    assert choose_sizes(num_tokens) == sizes


def test_an_image_reaches_from_its_first_embedding_to_its_last() -> None:
    assert span_of(PlaceholderRange(offset=3, length=5)) == (3, 8)
    is_embed = torch.tensor([False, True, True, False, True, False])
    assert span_of(PlaceholderRange(offset=3, length=6, is_embed=is_embed)) == (4, 8)


def test_every_image_of_a_models_prompts_is_another_one() -> None:
    model = Model("m", "/none", "A", ModelShape(2, 4), (Served({}, ("fastv",)),), ("2ii3", "i1"), 1)
    one, other = model.questions()
    assert (one.images, other.images) == ((0, 1), (2,))
    assert [part == IMAGE for part in one.parts] == [False] * 2 + [True] * 2 + [False] * 3
