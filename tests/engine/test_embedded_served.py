"""The embedded model on the real engine: right when dense and when pruned, wrong when the selector is."""

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams

from tests.engine.harness import engine
from vllm_hidrop.embedded import MODEL_DIR
from vllm_hidrop.training.evaluate import COUNT, make_example
from vllm_hidrop.training.questions import Question
from vllm_hidrop.training.scenes import Pixels

pytestmark = pytest.mark.engine

NUM_SCENES = 25
# Both cut at layer 2, where the model begins to read the image; see the model card.
CHOOSES = {"method": "pyramiddrop", "options": {"cuts": [0.34], "keeps": [58]}}
BLIND = {"method": "random", "options": {"layer": 2, "keep": 58}}


@pytest.fixture(scope="module")
def asked() -> list[tuple[Pixels, Question]]:
    """Held-out questions of the six types without count."""
    examples = [make_example(index) for index in range(NUM_SCENES)]
    return [(e.image, question) for e in examples for question in e.questions if question.type != COUNT]


def share_right(asked: Sequence[tuple[Pixels, Question]], hidrop: dict[str, Any]) -> float:
    """Exact match of the served answers."""
    with engine(MODEL_DIR, hidrop, max_logprobs=1, limit_mm_per_prompt={"image": 1}) as running:
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
    dense = share_right(asked, {"method": "none"})
    own = share_right(asked, {})
    chosen = share_right(asked, CHOOSES)
    blind = share_right(asked, BLIND)
    print(f"right of {len(asked)}: dense {dense:.3f}, own preset {own:.3f}, cut at 2 {chosen:.3f}, blind {blind:.3f}")
    assert dense >= 0.98
    assert own >= 0.97
    assert chosen >= 0.93
    assert blind <= 0.8
