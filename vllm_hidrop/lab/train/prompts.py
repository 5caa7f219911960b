"""Dialogues as packed token ids, labels and query rows. Axes: B samples, N tokens of all, T tokens of one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from vllm_hidrop.lab.train.conversations import Sample, Turn
from vllm_hidrop.lab.train.rows import Rows, packed_starts, places_in_samples

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One sample; the first four are [T]. ``pixel_values`` [images, ...] is None without images.

    Attributes:
        input_ids: the prompt with every image's placeholder repeated once per vision token.
        labels: the token's id where the assistant speaks, ``IGNORED`` elsewhere.
        images: index of the token's image, -1 for text.
        is_query: the last instruction token of every round.
    """

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    is_query: Tensor
    pixel_values: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Samples packed one behind the other: the first four are [N], as in :class:`Encoded`.

    ``row_starts`` int32 [B + 1] is where each sample starts, then N; it stays in host memory.
    """

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    is_query: Tensor
    row_starts: Tensor
    pixel_values: Tensor | None

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            images=self.images.to(device),
            is_query=self.is_query.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device),
        )

    def rows(self) -> Rows:
        """The batch's rows in the staged forward's form."""
        positions = places_in_samples(self.row_starts).to(self.images.device)
        return Rows(positions, self.images, self.is_query, self.row_starts)

    @property
    def targets(self) -> Tensor:
        """The label of the next token of the sample, int64 [N]."""
        targets = self.labels.roll(-1)
        targets[self.row_starts[1:].long() - 1] = IGNORED
        return targets


class PromptEncoder:
    """Encodes dialogues the way the model's own processor and chat template do.

    **Differs** where the template ends an answer with nothing but blanks (LLaVA-1.5's does) the end-of-sequence token
    is put there, so that the model learns to stop, as in LLaVA's own training.
    """

    def __init__(self, processor: Any, image_token_id: int, tokens_per_image: int, max_length: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(image_token_id)
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        if not self.tokenizer.is_fast:
            raise ValueError("training needs a fast tokenizer: labels are found by character offsets")
        if not (processor.chat_template or self.tokenizer.chat_template):
            raise ValueError("the model has no chat template")

    def render(self, turns: Sequence[Turn], prompts_answer: bool = False) -> str:
        """A dialogue as text; with ``prompts_answer`` it ends where the next answer begins."""
        messages = []
        for turn in turns:
            images: list[dict[str, str]] = [{"type": "image"}] * turn.num_images
            messages.append({"role": turn.role, "content": [*images, {"type": "text", "text": turn.text}]})
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts_answer))

    def pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """The rendered dialogue cut into texts, and whether the model shall learn to say each.

        Raises ValueError: the chat template does not render a dialogue as the start of a longer one.
        """
        pieces: list[tuple[str, bool]] = []
        done = ""
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            asked, answered = self.render(turns[:number], True), self.render(turns[: number + 1])
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise ValueError("the model's chat template changes earlier turns: labels cannot be placed")
            rest = answered[len(asked) :]
            answer = rest.rstrip()
            blanks = rest[len(answer) :]
            if answer.endswith(turn.text):
                answer += self.tokenizer.eos_token or ""
            pieces += [(asked[len(done) :], False), (answer, True), (blanks, False)]
            done = answered
        return pieces

    def encode(self, sample: Sample) -> Encoded:
        """Token ids, labels and pixels of a sample, cut to at most ``max_length`` tokens, never inside an image."""
        spoken: list[tuple[int, int]] = []
        text = ""
        for piece, is_spoken in self.pieces(sample.turns):
            expanded = piece.replace(self.image_token, self.image_token * self.tokens_per_image)
            if is_spoken:
                spoken.append((len(text), len(text) + len(expanded)))
            text += expanded
        starts_itself = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not starts_itself)
        ids = torch.tensor(found["input_ids"])
        is_target = torch.tensor([_lies_in(span, spoken) for span in found["offset_mapping"]])
        return self._encoded(ids, is_target, sample)

    def _encoded(self, ids: Tensor, is_target: Tensor, sample: Sample) -> Encoded:
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(sample.images) * self.tokens_per_image:
            raise ValueError(
                f"a sample of {len(sample.images)} images has {int(is_image.sum())} image tokens: "
                f"a text holds {self.image_token!r} or the chat template drops images"
            )
        images = torch.where(is_image, (is_image.cumsum(0) - 1) // self.tokens_per_image, -1)
        length = self._allowed_length(images)
        ids, is_target, images = ids[:length], is_target[:length], images[:length]
        labels = ids.where(is_target, torch.tensor(IGNORED))
        is_query = torch.zeros_like(is_target)
        is_query[:-1] = ~is_target[:-1] & is_target[1:]
        return Encoded(ids, labels, images, is_query, self._pixels(sample, int(images.max()) + 1))

    def _allowed_length(self, images: Tensor) -> int:
        if len(images) <= self.max_length or images[self.max_length] < 0:
            return min(len(images), self.max_length)
        return min(self.max_length, int((images == images[self.max_length]).nonzero()[0]))

    def _pixels(self, sample: Sample, num_images: int) -> Tensor | None:
        if num_images == 0:
            return None
        images = list(sample.images[:num_images])
        pixels: Tensor = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A packed batch."""
        encoded = [self.encode(sample) for sample in samples]
        pixels = [one.pixel_values for one in encoded if one.pixel_values is not None]
        return Batch(
            torch.cat([one.input_ids for one in encoded]),
            torch.cat([one.labels for one in encoded]),
            torch.cat([one.images for one in encoded]),
            torch.cat([one.is_query for one in encoded]),
            packed_starts([len(one.input_ids) for one in encoded]),
            torch.cat(pixels) if pixels else None,
        )


def _lies_in(span: tuple[int, int], spoken: list[tuple[int, int]]) -> bool:
    start, end = span
    return start < end and any(first <= start < stop for first, stop in spoken)
