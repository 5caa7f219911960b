"""MustDrop with its part in the vision tower, on the families that can run it, against the dense reference."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from tests.engine.harness import Answer, engine
from tests.families.asking import NUM_TOKENS, Question, ask, settings
from tests.families.checkpoints import CHECKPOINTS
from tests.families.test_family import check_pruned, close, same
from vllm_hidrop.verify.reference.mustdrop import MustDropOracle, MustDropResult
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

CHOICES = [
    MustDropSettings(0.0207, 0.05, (1, 3, 5), 0.15, 2),
    MustDropSettings(0.0207, 0.05, (1, 4), 0.15, 2, key_rate=0.3, key_layer="feature"),
    MustDropSettings(1.0, 1.0, (3,), -1.0, 4, key_rate=0.5, cut_cache=False),
    MustDropSettings(1.0, 1.0, (2,), None, 3, key_rate=0.2),
]
SIZES = ((64, 32), (40, 128), (100, 90), (64, 64))
"""Of the pictures, width and height; the second's tiles and the third's have padding that cuts windows."""


@dataclass
class LlavaNext:
    """The tiny LLaVA-NeXT, the questions it is asked, and the reference's answers."""

    directory: Path

    def __post_init__(self) -> None:
        self.family = CHECKPOINTS["llava_next"]
        self.questions = [
            Question(self.family, "4i5", SIZES[:1], 1),
            Question(self.family, "2i3i4", SIZES[1:3], 2),
            Question(self.family, "i9", SIZES[3:], 3),
            Question(self.family, "7", (), 4),
        ]

        self.settings = settings(self.family)

    @cached_property
    def stock(self) -> list[Answer]:
        with engine(self.directory, None, **self.settings) as running:
            return ask(running, self.questions)[0]

    @cached_property
    def oracle(self) -> MustDropOracle:
        return MustDropOracle(self.directory)

    @cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.directory)

    def expected(self, question: Question, token_ids: list[int], chosen: MustDropSettings) -> MustDropResult:
        images = question.images()
        made = self.processor.image_processor(images, return_tensors="pt") if images else {}
        return self.oracle.generate(
            token_ids, made.get("pixel_values"), chosen, NUM_TOKENS, image_sizes=made.get("image_sizes")
        )


@pytest.fixture(scope="module")
def llava_next(checkpoint: Callable[[str], Path]) -> LlavaNext:
    return LlavaNext(checkpoint("llava_next"))


@pytest.mark.parametrize("chosen", CHOICES)
def test_tiles_merge_and_rank_as_images_of_their_own(llava_next: LlavaNext, chosen: MustDropSettings) -> None:
    options = {**asdict(chosen), "filter_layers": list(chosen.filter_layers), "shape": [8, 64]}
    with engine(llava_next.directory, {"method": "mustdrop", "options": options}, **llava_next.settings) as running:
        off, expanded = ask(running, llava_next.questions, hidrop="off")
        pruned, _ = ask(running, llava_next.questions, hidrop_explain=True)
    assert all(map(same, off, llava_next.stock))
    assert close(pruned[-1], llava_next.stock[-1])
    num_merged = 0
    for question, ours, token_ids in zip(llava_next.questions[:-1], pruned, expanded, strict=False):
        theirs = llava_next.expected(question, token_ids, chosen)
        check_pruned(ours, theirs)
        assert any(theirs.keys), "no key tokens: nothing was tested"
        num_merged += token_ids.count(*llava_next.family.image) - sum(map(len, theirs.alive))
    assert bool(num_merged) == (chosen.merge_threshold is not None)
