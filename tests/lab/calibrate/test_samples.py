import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_hidrop.lab.calibrate.samples import read_samples, stream_list, synthetic_seeds, take
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


def test_a_list_longer_than_the_buffer_is_read_item_by_item(tmp_path: Path) -> None:
    entries = [{"id": index, "text": "x" * 1000} for index in range(300)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(entries, indent=1))
    assert list(stream_list(path)) == entries


def test_an_empty_list_has_no_items(tmp_path: Path) -> None:
    assert not list(stream_list(Path(write(tmp_path, []))))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ('{"a": 1}', "data.json is not a JSON list of entries"),
        ('[{"a": 1}, {"a"', "is not a JSON list of entries: entry 1"),
        ([3], "entry 0 of .* is not a JSON object"),
        ([{"image": "a.png"}], 'entry 0 of .*: "conversations" must be a list'),
        ([{"image": "a.png", "conversations": [{"from": "human"}]}], '"conversations" must be a list'),
        ([{"image": "a.png", "conversations": ROUND[::-1]}], 'the first round must be "human", then "gpt"'),
        ([{"image": "a.png", "conversations": [{"from": "human", "value": "hi"}]}], "must hold <image> once, got 0"),
        ([{"image": ["a.png"], "conversations": ROUND}], '"image" must be one file name'),
        ([{"id": 0}, {"image": "b.png", "conversations": ROUND}], "entry 1 of .*: no such image: .*b.png"),
        ([{"image": "data.json", "conversations": ROUND}], "entry 0 of .*: cannot read image"),
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
