import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_hidrop.lab.calibrate.samples import read_samples, synthetic_seeds, take
from vllm_hidrop.lab.train.scenes import FIRST_HELD_OUT_SEED

ROUND = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": " a cat "}]


def write(folder: Path, entries: Any) -> str:
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def test_synthetic_scenes_are_seeded_and_never_held_out() -> None:
    first, again, other = (list(islice(read_samples("synthetic", None, seed), 3)) for seed in (0, 0, 1))
    assert [s.question for s in first] == [s.question for s in again]
    assert [s.image.tobytes() for s in first] == [s.image.tobytes() for s in again]
    assert first[0].image.tobytes() != other[0].image.tobytes()
    assert all(seed < FIRST_HELD_OUT_SEED for seed in islice(synthetic_seeds(0), 1000))


def test_the_first_round_of_an_entry_is_read_and_text_only_entries_are_passed_over(tmp_path: Path) -> None:
    rounds = [*ROUND, {"from": "human", "value": "more?"}]
    entries = [{"id": 1, "conversations": ROUND}, {"image": "a.png", "conversations": rounds}]
    entries.append({"image": "a.png", "conversations": ROUND[:1]})
    samples = list(read_samples(write(tmp_path, entries), None, 0))
    assert [(s.question, s.answer, s.image.size) for s in samples] == [
        ("what?", "a cat", (8, 6)),
        ("what?", None, (8, 6)),
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ('{"a": 1}', "data.json is not a JSON list of entries"),
        ('[{"a": 1}, {"a"', "is not a JSON list of entries: .* truncated"),
        ([3], "entry 0: Input should be an object"),
        ([{"image": "a.png"}], "entry 0: conversations: Field required"),
        ([{"image": "a.png", "conversations": [{"from": "human"}]}], "entry 0: conversations.0.value: Field required"),
        ([{"image": "a.png", "conversations": ROUND[::-1]}], 'the first round must be "human", then "gpt"'),
        ([{"image": "a.png", "conversations": [{"from": "human", "value": "hi"}]}], "must hold <image> once"),
        ([{"image": ["a.png", "a.png"], "conversations": ROUND}], "and the entry one image"),
        ([{"image": 3, "conversations": ROUND}], "entry 0: image.str: Input should be a valid string"),
        ([{"id": 0, "conversations": ROUND}, {"image": "b.png", "conversations": ROUND}], "entry 1: no such image"),
        ([{"image": "data.json", "conversations": ROUND}], "entry 0: not a readable image"),
    ],
)
def test_a_wrong_file_is_named_with_its_entry(tmp_path: Path, entries: Any, message: str) -> None:
    path = write(tmp_path, entries)
    with pytest.raises(ValueError, match=message):
        list(read_samples(path, None, 0))


def test_missing_files_folders_and_too_few_entries_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"image": "a.png", "conversations": ROUND}])
    with pytest.raises(ValueError, match="no such data file: nowhere"):
        read_samples("nowhere", None, 0)
    with pytest.raises(ValueError, match="no such image folder"):
        read_samples(path, tmp_path / "nowhere", 0)
    with pytest.raises(ValueError, match="--images goes with a data file"):
        read_samples("synthetic", tmp_path, 0)
    with pytest.raises(ValueError, match="holds 1 entries with an image; at least 2"):
        list(take(read_samples(path, None, 0), 5, path))
