"""What the families' tests ask, of stock vLLM, of ours and of the reference, and where the vision tokens stand."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams

from tests.engine.harness import Answer, Engine, picture
from tests.families.checkpoints.form import TinyCheckpoint
from vllm_hidrop.verify.reference.shortened import Span

NUM_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """A prompt: in ``layout`` an i is an image, a v a video, a digit that many text tokens."""

    family: TinyCheckpoint
    layout: str
    image_sizes: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def token_ids(self) -> list[int]:
        return self.family.prompt(self.layout, self.seed)

    def images(self) -> list[Any]:
        return [picture(100 * self.seed + i, size) for i, size in enumerate(self.image_sizes)]

    def videos(self) -> list[Any]:
        shape = self.family.video_shape
        return [] if shape is None else [shape.frames(self.seed)] * self.layout.count("v")

    def prompt(self) -> dict[str, Any]:
        """For vLLM."""
        media: dict[str, Any] = {"image": self.images()} if self.image_sizes else {}
        if videos := self.videos():
            assert self.family.video_shape is not None
            media["video"] = [(frames, self.family.video_shape.metadata()) for frames in videos]
        return {"prompt_token_ids": self.token_ids()} | ({"multi_modal_data": media} if media else {})

    def spans(self, expanded: Sequence[int], num_frames: int) -> list[Span]:
        """Where the vision tokens stand in the ``expanded`` prompt, by its ids and the layout alone.

        An image reaches from its first to its last pad; of a video every run of pads is a frame, and one that is all of
        the video has ``num_frames``, equal but for what is left over at the end.
        """
        spans: list[Span] = []
        for kind, first, end in self._regions(expanded):
            pad, _ = Counter(expanded[first:end]).most_common(1)[0]
            pads = [place for place in range(first, end) if expanded[place] == pad]
            runs = [place for place in pads if place - 1 not in pads]
            if kind == "i":
                spans.append((pads[0], pads[-1] + 1))
            elif len(runs) > 1:
                ends = [place + 1 for place in pads if place + 1 not in pads]
                spans += zip(runs, ends, strict=True)
            else:
                starts = [pads[0] + frame * (len(pads) // num_frames) for frame in range(num_frames)]
                spans += zip(starts, [*starts[1:], pads[-1] + 1], strict=True)
        return spans

    def _regions(self, expanded: Sequence[int]) -> Iterator[tuple[str, int, int]]:
        """Kind, first place and end of what stands for every image and video."""
        given, cursor, place = self.token_ids(), 1, 1
        for index, part in enumerate(self.layout):
            if part.isdigit():
                cursor, place = cursor + int(part), place + int(part)
                continue
            cursor += len(self.family.image if part == "i" else self.family.video)
            text = given[cursor : cursor + int(self.layout[index + 1])]
            end = next(k for k in range(place + 1, len(expanded)) if list(expanded[k : k + len(text)]) == text)
            yield part, place, end
            place = end


def questions(family: TinyCheckpoint) -> list[Question]:
    """One image, two of different sizes, text alone, a video; as far as the family takes them."""
    sizes = family.image_sizes
    asked = [Question(family, "4i5", sizes[:1], 1), Question(family, "2i3i4", sizes[1::-1], 2)] if family.image else []
    asked.append(Question(family, "7", (), 3))
    return [*asked, Question(family, "3v5", (), 4)] if family.video else asked


def ask(
    running: Engine, asked: Sequence[Question], num_tokens: int = NUM_TOKENS, **options: Any
) -> tuple[list[Answer], list[list[int]]]:
    """Answers to all questions in one batch as far as the scheduler allows, and their expanded prompts."""
    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=-1, detokenize=False, extra_args=options
    )
    outputs = running.llm.generate([question.prompt() for question in asked], params, use_tqdm=False)
    return [running.answer(output) for output in outputs], [list(output.prompt_token_ids) for output in outputs]


def settings(family: TinyCheckpoint) -> dict[str, Any]:
    """Engine arguments."""
    limits = {"image": 2 if family.image else 0, "video": 1 if family.video else 0}
    return {
        "dtype": family.dtype,
        "limit_mm_per_prompt": limits,
        "skip_mm_profiling": True,
        "trust_remote_code": family.is_remote_code,
    }
