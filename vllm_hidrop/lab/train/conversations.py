"""Training samples: dialogues about images, read one at a time."""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from vllm_hidrop.lab.train.questions import QUESTION_TYPES, draw_questions
from vllm_hidrop.lab.train.scenes import FIRST_HELD_OUT_SEED, make_scene, render
from vllm_hidrop.lab.train.train_config import DataConfig
from vllm_hidrop.lab.validation import first_fault

PLACEHOLDER = "<image>"
"""Where LLaVA's files put an image, whatever the model's own token is."""
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Turn:
    """What one side says; its images stand before its text."""

    role: Role
    text: str
    num_images: int = 0


@dataclass(frozen=True)
class Sample:
    """A dialogue and its images, in the order of the turns."""

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]


class Source(Protocol):
    """A fixed number of samples, each read when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class _Spoken(BaseModel):
    speaker: Literal["system", "human", "gpt"] = Field(alias="from")
    value: str


class LlavaEntry(BaseModel):
    """One entry of a LLaVA file; other keys than these are ignored."""

    conversations: list[_Spoken]
    image: str | list[str] | None = None

    @property
    def images(self) -> list[str]:
        """Names of the image files."""
        return [self.image] if isinstance(self.image, str) else self.image or []

    def turns(self) -> tuple[Turn, ...]:
        """The dialogue, without a first turn of the assistant, which LLaVA leaves out too.

        Raises ValueError: the sides do not take turns, or placeholders and images do not fit each other.
        """
        turns = [_turn(said, number) for number, said in enumerate(self.conversations)]
        if turns and turns[0].role == "assistant":
            del turns[0]
        said = [turn.role for turn in turns if turn.role != "system"]
        if len(said) < 2 or said != (["user", "assistant"] * len(said))[: len(said)]:
            raise ValueError('"conversations" must take turns, "human" then "gpt"')
        num_placeholders = sum(turn.num_images for turn in turns)
        if num_placeholders != len(self.images):
            raise ValueError(f"{len(self.images)} images but {num_placeholders} {PLACEHOLDER} in the conversations")
        return tuple(turns)


def _turn(said: _Spoken, number: int) -> Turn:
    role = ROLES[said.speaker]
    if role != "user" and PLACEHOLDER in said.value:
        raise ValueError(f"turn {number}: {PLACEHOLDER} belongs to a human turn")
    return Turn(role, said.value.replace(PLACEHOLDER, "").strip(), said.value.count(PLACEHOLDER))


class EntriesFile:
    """The entries of a LLaVA file, ``.jsonl`` or a JSON list: mapped and found at once, parsed when asked for.

    ValueError: no such file, or no JSON of this form. ``images`` is the folder of its images, by default the file's.
    """

    def __init__(self, path: Path, images: Path | None) -> None:
        self.path, self.image_root = path, images or path.parent
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            content = memoryview(mapped)[len(UTF8_MARK) * (mapped[: len(UTF8_MARK)] == UTF8_MARK) :]
            if path.suffix == ".jsonl":
                self._entries = msgspec.json.Decoder(msgspec.Raw).decode_lines(content)
            else:
                self._entries = msgspec.json.decode(content, type=list[msgspec.Raw])
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path} is not a JSON list of entries: {error}") from None

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> LlavaEntry:
        """An entry; ValueError with its index when it has another form."""
        try:
            return LlavaEntry.model_validate_json(bytes(self._entries[index]))
        except ValidationError as error:
            raise self.fault(index, first_fault(error)) from None

    def open_images(self, index: int, names: Iterable[str]) -> tuple[Image.Image, ...]:
        """An entry's images in RGB; ValueError with its index when one cannot be read."""
        return tuple(self._open(index, self.image_root / name) for name in names)

    def _open(self, index: int, path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except OSError as error:
            what = "no such image" if isinstance(error, FileNotFoundError) else "not a readable image"
            raise self.fault(index, f"{what}: {path}") from None

    def fault(self, index: int, what: object) -> ValueError:
        """The error to raise for an entry."""
        return ValueError(f"{self.path}: entry {index}: {what}")


class LlavaFile(EntriesFile):
    """Dialogues of a LLaVA file; every entry is checked once, then read from disk with its images when asked for.

    Raises ValueError: no such file, not JSON, or an entry of another form (with its index).
    """

    def __init__(self, path: Path, images: Path | None) -> None:
        super().__init__(path, images)
        if not len(self):
            raise ValueError(f"{path} holds no entries")
        for index in range(len(self)):
            self._turns(index, self.entry(index))

    def __getitem__(self, index: int) -> Sample:
        entry = self.entry(index)
        return Sample(self._turns(index, entry), self.open_images(index, entry.images))

    def _turns(self, index: int, entry: LlavaEntry) -> tuple[Turn, ...]:
        try:
            return entry.turns()
        except ValueError as error:
            raise self.fault(index, error) from None


class SyntheticScenes:
    """Seeded scenes with exact answers, never a held-out one."""

    def __init__(self, num_samples: int, rounds: int, seed: int) -> None:
        if num_samples > FIRST_HELD_OUT_SEED:
            raise ValueError(f"num_samples must be at most {FIRST_HELD_OUT_SEED}, got {num_samples}")
        self.num_samples, self.rounds, self.seed = num_samples, rounds, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        scene = make_scene(index)
        asked = draw_questions(scene, np.random.default_rng([self.seed, index]), self.rounds, tuple(QUESTION_TYPES))
        turns = []
        for number, question in enumerate(asked):
            turns += [Turn("user", question.text, int(number == 0)), Turn("assistant", question.answer)]
        return Sample(tuple(turns), (Image.fromarray(render(scene)),))


def open_source(config: DataConfig, seed: int) -> Source:
    """The samples a configuration asks for; ValueError: files that cannot be read in the configured format."""
    if config.format == "synthetic":
        return SyntheticScenes(config.num_samples, config.rounds, seed)
    assert config.path is not None
    return LlavaFile(config.path, config.images)
