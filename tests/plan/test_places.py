"""Places of a stage against a list of tokens that is filtered one by one."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_hidrop.plan.places import Span, StagePlaces
from vllm_hidrop.plan.planner import spans_of


@dataclass(frozen=True)
class Token:
    place: int
    image: int | None = None
    number: int = 0
    """Inside its image."""


@dataclass(frozen=True)
class Prompt:
    tokens: list[Token]
    survivors: list[list[int]]

    @property
    def stage(self) -> list[Token]:
        """The tokens that the stage holds, in order."""
        held = []
        for token in self.tokens:
            if token.image is None:
                held.append(token)
            elif token.number == 0:  # its image's survivors, in their own order
                held += [Token(token.place + number, token.image, number) for number in self.survivors[token.image]]
        return held

    @property
    def spans(self) -> tuple[Span, ...]:
        firsts = [token.place for token in self.tokens if token.image is not None and token.number == 0]
        lengths = [sum(token.image == image for token in self.tokens) for image in range(len(firsts))]
        return tuple(map(Span, firsts, lengths))

    @property
    def places(self) -> StagePlaces:
        return StagePlaces(self.spans, tuple(map(len, self.survivors)))

    @property
    def chosen(self) -> list[npt.NDArray[np.int32]]:
        return [np.array(numbers, dtype=np.int32) for numbers in self.survivors]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Text and images in any order; some of each image's tokens stay, in any order (merged ones come first)."""
    tokens: list[Token] = []
    survivors: list[list[int]] = []
    for length in draw(st.lists(st.integers(0, 9), min_size=1, max_size=8)):
        if length == 0 or draw(st.booleans()):
            tokens += [Token(len(tokens) + number) for number in range(length)]
        else:
            tokens += [Token(len(tokens) + number, len(survivors), number) for number in range(length)]
            survivors.append(draw(st.lists(st.integers(0, length - 1), unique=True)))
    return Prompt(tokens, survivors)


@given(prompts())
def test_an_images_tokens_stand_where_the_filtered_list_has_them(prompt: Prompt) -> None:
    stage = prompt.stage
    for image, here in enumerate(prompt.places.images):
        assert [token.number for token in stage[here.offset : here.end]] == prompt.survivors[image]
        assert all(token.image == image for token in stage[here.offset : here.end])


@given(prompts())
def test_tokens_are_counted_as_in_the_filtered_list(prompt: Prompt) -> None:
    inside = {place for span in prompt.spans for place in range(span.offset + 1, span.end)}
    for num_tokens in set(range(len(prompt.tokens) + 1)) - inside:
        assert prompt.places.count(num_tokens) == sum(token.place < num_tokens for token in prompt.stage)
    assert prompt.places.count(len(prompt.tokens) + 3) == len(prompt.stage) + 3, "what is generated is held"


def test_an_image_cannot_be_split() -> None:
    with pytest.raises(AssertionError, match="cannot be split"):
        StagePlaces((Span(2, 4),), (1,)).count(4)


@given(prompts())
def test_prompt_places_are_those_of_the_filtered_list(prompt: Prompt) -> None:
    found = prompt.places.prompt_places(len(prompt.tokens), prompt.chosen)
    assert found.dtype == np.int64
    assert found.tolist() == [token.place for token in prompt.stage]


@given(prompts().filter(lambda prompt: bool(prompt.survivors)))
def test_vision_and_the_text_behind_it_are_those_of_the_filtered_list(prompt: Prompt) -> None:
    stage = prompt.stage
    vision = [place for place, token in enumerate(stage) if token.image is not None]
    first = prompt.spans[0].offset
    text = [place for place, token in enumerate(stage) if token.image is None and token.place > first]
    assert prompt.places.vision_places().tolist() == vision
    assert prompt.places.text_behind_first_image(len(prompt.tokens)).tolist() == text


@pytest.mark.parametrize(("length", "lengths"), [(12, [4, 4, 4]), (13, [4, 4, 5]), (4, [4]), (3, [3])])
def test_a_video_has_a_span_per_frame_however_short(length: int, lengths: list[int]) -> None:
    """What is left over goes to the last frame; less than a frame is one."""
    position = PlaceholderRange(offset=7, length=length)
    feature = MultiModalFeatureSpec(None, "video", identifier="", mm_position=position)
    spans = spans_of(feature, 2, frame_tokens=4)
    assert [span.length for span in spans] == lengths
    assert [span.offset for span in spans] == [7 + sum(lengths[:i]) for i in range(len(lengths))]
    assert {span.item for span in spans} == {2}
