"""Edited attention against its definition: the weights themselves, edited row by row."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.methods.adaptive import AttentionEdit, Sight
from vllm_hidrop.staged import attention_edits as edits
from vllm_hidrop.staged.attention_edits import Heads, Images, edited_rows

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

EDITS = [AttentionEdit(*which) for which in product(Sight, (False, True), (False, True))]
every_edit = pytest.mark.parametrize("edit", EDITS, ids=str)


def random_heads(num_rows: int, num_heads: int, num_kv_heads: int, seed: int) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def rows(heads: int) -> torch.Tensor:
        return torch.randn(num_rows, heads, 8, generator=generator, dtype=torch.float64)

    return Heads(rows(num_heads), rows(num_kv_heads), rows(num_kv_heads), scale=0.5)


def dense(edit: AttentionEdit | None, heads: Heads, images: Images) -> torch.Tensor:
    """[P, H, D], from all weights [H, P, P]; None edits none."""
    num_rows, num_heads, _ = heads.query.shape
    key, value = (part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (heads.key, heads.value))
    logits = torch.einsum("qhd,khd->hqk", heads.query, key) * heads.scale
    logits += torch.full((num_rows, num_rows), -torch.inf, dtype=logits.dtype).triu(1)
    is_vision = torch.zeros(num_rows, dtype=torch.bool)
    gone = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for first, length in images:
        is_vision[first : first + length] = True
    for first, length in images:
        if edit is None:
            break
        own = torch.arange(first, first + length)
        lost = {Sight.FIRST: own[1:], Sight.SECOND_HALF: own[: length // 2], Sight.NONE: own}[edit.text_sees]
        gone[:, lost] |= ~is_vision[:, None]
        gone[:, own] |= is_vision[:, None] & edit.vision_is_blind
    if edit and edit.renormalise:
        logits = logits.masked_fill(gone, -torch.inf)
    weights = logits.softmax(dim=-1).nan_to_num(0)  # a row without a key has NaN
    if edit and edit.text_sees is Sight.FIRST and not edit.renormalise:
        for first, length in images:
            moved = weights[:, ~is_vision, first : first + length].sum(-1)
            weights[:, ~is_vision, first] = moved
    return torch.einsum("hqk,khd->qhd", weights.masked_fill(gone, 0), value)


def edited(edit: AttentionEdit, heads: Heads, images: Images) -> torch.Tensor:
    """What plain attention becomes once the edited rows are put in.

    Blind rows that are not renormalised are the engine's: plain attention with the images' values zero.
    """
    output = dense(None, heads, images)
    seen: list[int] = []
    if edit.vision_is_blind and not edit.renormalise:
        vision = torch.cat([torch.arange(first, first + length) for first, length in images])
        without = replace(heads, value=heads.value.index_fill(0, vision, 0))
        output[vision] = dense(None, without, images)[vision]
        seen += vision.tolist()
    for rows, values in edited_rows(edit, heads, images):
        assert values.shape == (len(rows), *output.shape[1:])
        seen += rows.tolist()
        output[rows] = values
    assert len(seen) == len(set(seen)), "a row is computed twice"
    return output


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, Images]:
    """Rows of a prompt, and its images: maybe first, adjacent, or last."""
    images, end = [], draw(st.integers(0, 3))
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)):
        images.append((end, length))
        end += length + draw(st.integers(0, 3))
    return end, images


@every_edit
@settings(max_examples=30)
@given(prompt=prompts(), num_heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]), seed=st.integers(0, 99))
def test_the_edited_rows_are_those_of_the_edited_weights(
    edit: AttentionEdit, prompt: tuple[int, Images], num_heads: tuple[int, int], seed: int
) -> None:
    num_rows, images = prompt
    heads = random_heads(num_rows, *num_heads, seed)
    assert_close(edited(edit, heads, images), dense(edit, heads, images))


LONG: tuple[int, Images] = (23, [(2, 7), (12, 4)])


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every piece of work; a piece may hold two rows of :data:`LONG` at most."""
    made: list[int] = []
    attend = edits._attend

    def counting(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows, values = attend(*args)  # type: ignore[arg-type]
        made.append(len(rows))
        return rows, values

    monkeypatch.setattr(edits, "MAX_WEIGHTS", 2 * 4 * LONG[0] + 1)
    monkeypatch.setattr(edits, "_attend", counting)
    return made


@every_edit
def test_work_in_pieces_gives_the_same(edit: AttentionEdit, tiles: list[int]) -> None:
    num_rows, images = LONG
    heads = random_heads(num_rows, 4, 2, seed=0)
    assert_close(edited(edit, heads, images), dense(edit, heads, images))
    assert max(tiles) == 2
    assert len(tiles) >= 5


def test_a_single_row_that_exceeds_the_limit_is_still_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "MAX_WEIGHTS", 1)
    heads = random_heads(6, 2, 1, seed=1)
    edit = AttentionEdit(Sight.FIRST, vision_is_blind=True, renormalise=True)
    assert_close(edited(edit, heads, [(1, 3)]), dense(edit, heads, [(1, 3)]))


@pytest.mark.parametrize("renormalise", [False, True])
def test_blind_vision_at_the_prompts_start_sees_nothing(renormalise: bool) -> None:
    edit = AttentionEdit(Sight.NONE, vision_is_blind=True, renormalise=renormalise)
    output = edited(edit, random_heads(5, 2, 1, seed=2), [(0, 3)])
    assert torch.equal(output[:3], torch.zeros(3, 2, 8, dtype=torch.float64))
    assert output[3:].all()


def test_rows_before_the_first_image_are_left_alone() -> None:
    for edit in EDITS:
        rows = torch.cat([rows for rows, _ in edited_rows(edit, random_heads(9, 2, 2, seed=3), [(2, 3), (6, 1)])])
        assert sorted(rows.tolist()) == (
            [2, 3, 4, 5, 6, 7, 8] if edit.vision_is_blind and edit.renormalise else [5, 7, 8]
        )


def test_outputs_have_the_models_type_and_the_inputs_stay_as_they_are() -> None:
    exact = random_heads(9, 2, 1, seed=4)
    heads = Heads(exact.query.bfloat16(), exact.key.bfloat16(), exact.value.bfloat16(), exact.scale)
    for edit in EDITS:
        assert {values.dtype for _, values in edited_rows(edit, heads, [(2, 4)])} == {torch.bfloat16}
    assert torch.equal(heads.value, exact.value.bfloat16())
