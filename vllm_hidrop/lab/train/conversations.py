"""Samples to train on: dialogues about images, read one at a time. Knows neither tokens nor models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from vllm_hidrop.lab.train.json_entries import index_entries, read_entry
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, draw_questions
from vllm_hidrop.lab.train.run_config import DataConfig
from vllm_hidrop.lab.train.scenes import FIRST_HELD_OUT_SEED, make_scene, render

PLACEHOLDER = "<image>"
"""Where LLaVA's files put an image, whatever the model's own token is."""
ROLES: dict[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says; its images stand before its text."""

    role: Literal["system", "user", "assistant"]
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


def read_turns(entry: object) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Turns and image names of one LLaVA entry; a first turn of the assistant is left out, as LLaVA does.

    Raises:
        ValueError: says what is wrong with the entry.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise ValueError('expected an object with a list "conversations"')
    turns = [_turn(value, number) for number, value in enumerate(entry["conversations"])]
    if turns and turns[0].role == "assistant":
        del turns[0]
    said = [turn.role for turn in turns if turn.role != "system"]
    if len(said) < 2 or said != (["user", "assistant"] * len(said))[: len(said)]:
        raise ValueError('"conversations" must take turns, "human" then "gpt"')
    image = entry.get("image")
    names = () if image is None else tuple(image) if isinstance(image, list) else (image,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError('"image" must be a file name or a list of them')
    num_placeholders = sum(turn.num_images for turn in turns)
    if num_placeholders != len(names):
        raise ValueError(f"{len(names)} images but {num_placeholders} {PLACEHOLDER} in the conversations")
    return tuple(turns), names


def _turn(value: object, number: int) -> Turn:
    if not isinstance(value, dict) or not isinstance(value.get("value"), str) or value.get("from") not in ROLES:
        raise ValueError(f'turn {number} must have "from" (one of {", ".join(ROLES)}) and a text "value"')
    role, text = ROLES[value["from"]], value["value"]
    if role != "user" and PLACEHOLDER in text:
        raise ValueError(f"turn {number}: {PLACEHOLDER} belongs to a human turn")
    return Turn(role, text.replace(PLACEHOLDER, "").strip(), text.count(PLACEHOLDER))


class LlavaFile:
    """Dialogues of a LLaVA file; every entry is checked once, then read from disk with its images when asked for.

    Raises:
        ValueError: no such file, not JSON, or an entry of another form (with its index).
    """

    def __init__(self, path: Path, images: Path | None) -> None:
        self.path = path
        self.image_root = images or path.parent
        self._spans = index_entries(path, read_turns)

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: int) -> Sample:
        entry: Any = read_entry(self.path, self._spans[2 * index], self._spans[2 * index + 1])
        turns, names = read_turns(entry)
        return Sample(turns, tuple(self._open(index, name) for name in names))

    def _open(self, index: int, name: str) -> Image.Image:
        path = self.image_root / name
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except OSError as error:
            what = "no such image" if isinstance(error, FileNotFoundError) else "not a readable image"
            raise ValueError(f"{self.path}: entry {index}: {what}: {path}") from None


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
    """The samples a configuration asks for.

    Raises:
        ValueError: the files cannot be read as what they are said to be.
    """
    if config.format == "synthetic":
        return SyntheticScenes(config.num_samples, config.rounds, seed)
    assert config.path is not None
    return LlavaFile(config.path, config.images)
