"""Pictures with a question and, where known, an answer: synthetic scenes, or a LLaVA-JSON file. Knows no model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SYNTHETIC = "synthetic"
IMAGE_MARK = "<image>"
CHUNK_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Sample:
    """One question about one picture; ``answer`` is None where the data has none."""

    image: Image.Image
    question: str
    answer: str | None


def read_samples(data: str, images: Path | None, seed: int) -> Iterator[Sample]:
    """Samples in a fixed order, made or read when asked for.

    Args:
        data: "synthetic", or a JSON file in LLaVA's form, read in file order.
        images: folder that the file's image names start from; default: the file's own.
        seed: which synthetic scenes.

    Raises:
        ValueError: a missing file or image, or an entry of another form (named by its index).
    """
    if data == SYNTHETIC:
        if images is not None:
            raise ValueError("--images goes with a data file, not with synthetic scenes")
        return _synthetic(seed)
    path = Path(data)
    if not path.is_file():
        raise ValueError(f'no such data file: {data} (or "{SYNTHETIC}")')
    folder = path.parent if images is None else images
    if not folder.is_dir():
        raise ValueError(f"no such image folder: {folder}")
    return _from_file(path, folder)


def _synthetic(seed: int) -> Iterator[Sample]:
    from vllm_hidrop.lab.train.questions import QUESTION_TYPES, draw_questions
    from vllm_hidrop.lab.train.scenes import make_scene, render

    for scene_seed in synthetic_seeds(seed):
        scene = make_scene(scene_seed)
        question = draw_questions(scene, np.random.default_rng([scene_seed, 7]), 1, tuple(QUESTION_TYPES))[0]
        yield Sample(Image.fromarray(render(scene)), question.text, question.answer)


def synthetic_seeds(seed: int) -> Iterator[int]:
    """Scene seeds of the training range: held-out scenes stay unseen until evaluation."""
    from vllm_hidrop.lab.train.scenes import FIRST_HELD_OUT_SEED

    rng = np.random.default_rng([seed, 6])
    while True:
        yield int(rng.integers(FIRST_HELD_OUT_SEED))


def _from_file(path: Path, folder: Path) -> Iterator[Sample]:
    for index, entry in enumerate(stream_list(path)):
        where = f"entry {index} of {path}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is not a JSON object")
        if "image" not in entry:
            continue  # LLaVA's instruction mix holds entries of text only
        question, answer = _first_round(entry, where)
        yield Sample(_open(entry["image"], folder, where), question, answer)


def _first_round(entry: dict[str, Any], where: str) -> tuple[str, str | None]:
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns[:2]):
        raise ValueError(f'{where}: "conversations" must be a list of {{"from": ..., "value": ...}}')
    if turns[0]["from"] != "human" or (len(turns) > 1 and turns[1]["from"] != "gpt"):
        raise ValueError(f'{where}: the first round must be "human", then "gpt"')
    text = turns[0]["value"]
    if text.count(IMAGE_MARK) != 1:
        raise ValueError(f"{where}: the first question must hold {IMAGE_MARK} once, got {text.count(IMAGE_MARK)}")
    answer = turns[1]["value"].strip() if len(turns) > 1 else ""
    return text.replace(IMAGE_MARK, "").strip(), answer or None


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))


def _open(name: object, folder: Path, where: str) -> Image.Image:
    if not isinstance(name, str):
        raise ValueError(f'{where}: "image" must be one file name, got {name!r}')
    if not (folder / name).is_file():
        raise ValueError(f"{where}: no such image: {folder / name}")
    try:
        with Image.open(folder / name) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{where}: cannot read image {folder / name}: {error}") from None


def stream_list(path: Path) -> Iterator[Any]:
    """The items of a JSON list, decoded one by one while the file is read.

    Raises:
        ValueError: the file is not a JSON list; the message names the item where it stops being one.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        buffer = file.read(CHUNK_CHARACTERS).lstrip()
        if not buffer.startswith("["):
            raise ValueError(f"{path} is not a JSON list of entries")
        buffer, index = buffer[1:], 0
        while True:
            buffer = buffer.lstrip().removeprefix(",").lstrip() if index else buffer.lstrip()
            if buffer.startswith("]"):
                return
            try:
                item, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError as error:
                more = file.read(max(CHUNK_CHARACTERS, len(buffer)))
                if not more:
                    raise ValueError(f"{path} is not a JSON list of entries: entry {index}: {error.msg}") from None
                buffer += more
                continue
            yield item
            buffer, index = buffer[end:], index + 1


def take(samples: Iterator[Sample], count: int, data: str) -> Iterator[Sample]:
    """The first ``count`` samples.

    Raises:
        ValueError: fewer than 2: a mismatched image needs another one.
    """
    num_taken = 0
    for sample in islice(samples, count):
        num_taken += 1
        yield sample
    if num_taken < 2:
        raise ValueError(f"{data} holds {num_taken} entries with an image; at least 2 are needed")
