"""The embedded checkpoints on the real engine: right when dense and when pruned, wrong when the selector is."""

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams

from tests.engine.harness import engine
from vllm_hidrop.embedded import CHECKPOINTS
from vllm_hidrop.lab.train.evaluate import COUNT, make_example
from vllm_hidrop.lab.train.questions import Question
from vllm_hidrop.lab.train.scenes import Pixels

pytestmark = pytest.mark.engine

NUM_SCENES = 25
# Both cut at layer 3, where the models begin to read the image; see the model cards.
CHOOSES = {"method": "pyramiddrop", "options": {"cuts": [0.25], "keeps": [96]}}
BLIND = {"method": "random", "options": {"layer": 3, "keep": 96}}


@pytest.fixture(scope="module")
def asked() -> list[tuple[Pixels, Question]]:
    """Held-out questions of the six types without count."""
    examples = [make_example(index) for index in range(NUM_SCENES)]
    return [(e.image, question) for e in examples for question in e.questions if question.type != COUNT]


def share_right(asked: Sequence[tuple[Pixels, Question]], form: str, hidrop: dict[str, Any]) -> float:
    """Exact match of a checkpoint's served answers."""
    with engine(CHECKPOINTS[form], hidrop, max_logprobs=1, limit_mm_per_prompt={"image": 1}) as running:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_pil", "image_pil": Image.fromarray(image)},
                        {"type": "text", "text": question.text},
                    ],
                }
            ]
            for image, question in asked
        ]
        params = SamplingParams(temperature=0, max_tokens=8)
        outputs = running.llm.chat(conversations, params, use_tqdm=False)
    answers = [output.outputs[0].text.strip() for output in outputs]
    return sum(a == question.answer for a, (_, question) in zip(answers, asked, strict=True)) / len(asked)


def test_answers_hold_when_pruned_and_fall_when_the_selector_is_blind(asked: list[tuple[Pixels, Question]]) -> None:
    dense = share_right(asked, "dense", {})
    own = share_right(asked, "hidrop", {})
    chosen = share_right(asked, "dense", CHOOSES)
    blind = share_right(asked, "dense", BLIND)
    print(f"right of {len(asked)}: dense {dense:.3f}, hidrop {own:.3f}, dense cut at 3 {chosen:.3f}, blind {blind:.3f}")
    assert dense >= 0.95
    assert own >= 0.95
    assert chosen >= 0.85
    assert blind <= chosen - 0.08
