"""Grouped ids by hand, and as the definition says, for any rows of any prompt."""

import numpy as np
import pytest

from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.positions import grouped_ids


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ([Span(2, 4)], [0, 1, 2, 3, 4, 5, 2, 3, 4, 5]),
        ([Span(0, 3)], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]),
        ([Span(1, 3), Span(5, 2)], [0, 1, 2, 3, 1, 5, 6, 2, 3, 4]),
        ([Span(1, 2), Span(3, 2)], [0, 1, 2, 3, 4, 1, 2, 3, 4, 5]),
    ],
)
def test_text_is_numbered_without_the_hole_and_vision_keeps_its_places(spans: list[Span], expected: list[int]) -> None:
    places = np.arange(10)
    assert grouped_ids(places, spans).tolist() == expected
    assert grouped_ids(places[6:8], spans).tolist() == expected[6:8], "a step may hold any part of a sequence"
    assert places.tolist() == list(range(10))
