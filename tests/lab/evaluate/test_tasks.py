"""Every adapter on a tiny file of the official form, with scores worked out by hand."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.evaluate.benchmark_files import PNG, write_images, write_json, write_lines, write_pope
from vllm_hidrop.lab.evaluate.answer_form import normalised
from vllm_hidrop.lab.evaluate.samples import Sample, Scored, Source, choose
from vllm_hidrop.lab.evaluate.tasks import TASKS, load_task, mmbench, scienceqa


def scored(name: str, source: Source, texts: list[str]) -> list[Scored]:
    task = load_task(name)
    samples = task.load(source)
    return [Scored(sample, task.score(sample, text)) for sample, text in zip(samples, texts, strict=True)]


def scores(name: str, source: Source, texts: list[str]) -> list[float]:
    return [one.score for one in scored(name, source, texts)]


def test_pope_gives_the_five_official_figures(tmp_path: Path) -> None:
    source = Source(write_pope(tmp_path, "yyynnn"), tmp_path / "images")
    answers = ["Yes", "Yes, there is.", "No", "No, it is not there.", "Yes", "There is not. Yes"]
    result = scored("pope", source, answers)
    assert [one.score for one in result] == [1, 1, 0, 1, 0, 1]
    figures = load_task("pope").figures(result)  # TP 2, FN 1, FP 1, TN 2
    assert figures == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.5})
    assert {one.sample.type for one in result} == {"random"}


def test_pope_reads_a_folder_by_category_and_keeps_equal_ids_apart(tmp_path: Path) -> None:
    for category in ("random", "popular", "adversarial"):
        write_pope(tmp_path, "yn", f"coco_pope_{category}.json")
    samples = load_task("pope").load(Source(tmp_path, tmp_path / "images"))
    assert len({sample.id for sample in samples}) == 6
    assert samples[0].question == "Is there a thing 0?\nAnswer the question using a single word or phrase."
    assert samples[0].image() == PNG


def test_pope_without_a_single_yes_has_f1_0(tmp_path: Path) -> None:
    result = scored("pope", Source(write_pope(tmp_path, "yn"), tmp_path / "images"), ["no", "no"])
    assert load_task("pope").figures(result) == {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def write_scienceqa(folder: Path, **changes: Any) -> Path:
    problem = {"question": "Which?", "choices": ["x", "y", "z"], "answer": 1, "hint": "", "image": "image.png"}
    problem |= {"subject": "natural science"}
    hinted = {**problem, "hint": "Look.", "answer": 0, "subject": "language science"}
    write_json(folder / "problems.json", {"4": {**problem, **changes}, "7": hinted, "9": {**problem, "image": None}})
    write_json(folder / "pid_splits.json", {"train": [], "test": ["4", "7", "9"]})
    write_images(folder / "test", "4/image.png", "7/image.png")
    return folder


def test_scienceqa_asks_the_image_subset_in_llavas_form(tmp_path: Path) -> None:
    samples = load_task("scienceqa").load(Source(write_scienceqa(tmp_path)))
    ending = "\nA. x\nB. y\nC. z\nAnswer with the option's letter from the given choices directly."
    assert [sample.question for sample in samples] == [f"Which?{ending}", f"Context: Look.\nWhich?{ending}"]
    assert [sample.expected for sample in samples] == [("B",), ("A",)]
    assert [sample.type for sample in samples] == ["natural science", "language science"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), (" B ", "B"), ("B. y", "B"), ("B\nbecause", "B"), ("The answer is B.", "B")),
        *(("Well. The answer is B", "B"), ("b", None), ("B) y", None), ("y", None), ("", None), ("F", None)),
    ],
)
def test_scienceqa_takes_the_letter_where_llava_does(text: str, letter: str | None) -> None:
    assert scienceqa.parse(text) == letter


def test_gqa_is_exact_match_in_lower_case_without_full_stop(tmp_path: Path) -> None:
    row = {"imageId": "n1", "question": "What?", "answer": "table", "types": {"structural": "query"}}
    file = write_json(tmp_path / "q.json", {str(number): row for number in range(4)})
    source = Source(file, write_images(tmp_path, "n1.jpg"))
    assert scores("gqa", source, ["Table.", "table", "tables", "a table"]) == [1, 1, 0, 0]
    assert load_task("gqa").load(source)[0].type == "query"


def write_textvqa(folder: Path, answers: list[str]) -> Source:
    row = {"question_id": 34602, "image_id": "i1", "question": "what does it say?", "answers": answers}
    file = write_json(folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    return Source(file, write_images(folder, "i1.jpg"))


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_textvqa_leaves_one_human_out(tmp_path: Path, same: int, expected: float) -> None:
    source = write_textvqa(tmp_path, ["stop"] * same + [f"other {n}" for n in range(10 - same)])
    assert scores("textvqa", source, ["Stop."]) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("U.S.A.", "usa"),
        ("well-known", "well known"),
        ("well - known", "well known"),
        ("joe's", "joe 's"),
        ("what?\nnow", "what now"),
        ("half/half", "half half"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalised_as_officially(text: str, form: str) -> None:
    assert normalised(text) == form


def write_mme(folder: Path, *lines: str, subtask: str = "existence") -> Source:
    write_images(folder / "images", f"{subtask}/a.jpg", f"{subtask}/images/b.jpg")
    write_lines(folder / f"{subtask}.txt", *lines)
    return Source(folder, folder / "images")


PAIRS = (
    "a.jpg\tIs it A? Please answer yes or no.\tYes",
    "a.jpg\tIs it B? Please answer yes or no.\tNo",
    "b.jpg\tIs it C? Please answer yes or no.\tYes",
    "b.jpg\tIs it D? Please answer yes or no.\tNo",
)


def test_mme_adds_accuracy_and_the_share_of_images_with_both_right(tmp_path: Path) -> None:
    write_mme(tmp_path, *PAIRS)
    source = write_mme(tmp_path, *PAIRS[:2], subtask="code_reasoning")
    result = scored("mme", source, ["no", "no.", "Yes", "No, it is", "yes, so", "The answer: no"])
    by_subtask = load_task("mme").figures(result)
    assert by_subtask == {
        **{"code_reasoning/acc": 50, "code_reasoning/acc_plus": 0, "code_reasoning/score": 50},
        **{"existence/acc": 75, "existence/acc_plus": 50, "existence/score": 125},
        **{"perception": 125, "cognition": 50},
    }
    assert result[0].sample.question == "Is it A?\nAnswer the question using a single word or phrase."


def test_a_limit_keeps_mme_pairs_whole(tmp_path: Path) -> None:
    folder = write_mme(tmp_path, *PAIRS)
    chosen = load_task("mme").load(Source(folder.data, folder.images, limit=1))
    assert len(chosen) == 2
    assert chosen[0].group == chosen[1].group


def write_mmbench(folder: Path, **changes: str) -> Path:
    row = {"index": "1", "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "C": "", "D": "nan"}
    row |= {"answer": "B", "category": "identity", "image": base64.b64encode(PNG).decode()} | changes
    again = row | {"index": "1000001", "hint": "nan", "image": "1"}
    return write_lines(folder / "dev.tsv", "\t".join(row), "\t".join(row.values()), "\t".join(again.values()))


def test_mmbench_reads_images_and_references_to_them(tmp_path: Path) -> None:
    samples = load_task("mmbench").load(Source(write_mmbench(tmp_path)))
    ending = "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert [sample.question for sample in samples] == [f"Look.\n{ending}", ending]
    assert [sample.image() for sample in samples] == [PNG, PNG]
    assert scores("mmbench", Source(write_mmbench(tmp_path)), ["B. dog", "A"]) == [1, 0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(B) dog", "B"), ("B: dog", "B"), ("Dog.", "B"), ("Because", None), ("A dog", "A"), ("", None)],
)
def test_mmbench_takes_a_letter_or_an_options_text(text: str, letter: str | None) -> None:
    assert mmbench.parse(("cat", "dog"), text) == letter


def test_synthetic_questions_repeat_by_seed_and_take_types_in_turn() -> None:
    load = load_task("synthetic").load
    first, again, other = (load(Source(limit=16, seed=seed)) for seed in (3, 3, 4))
    assert [sample.id for sample in first] == [sample.id for sample in again]
    assert first[0].image() == again[0].image()
    assert not {sample.id for sample in first} & {sample.id for sample in other}
    counts = [[sample.type for sample in first].count(kind) for kind in {sample.type for sample in first}]
    assert max(counts) - min(counts) <= 1
    assert [sample.id for sample in load(Source(limit=5, seed=3))] == [sample.id for sample in first[:5]]
    assert load_task("synthetic").score(first[0], f" {first[0].expected[0]} ") == 1


def sample(number: int) -> Sample:
    return Sample(str(number), "?", lambda: PNG, ("yes",), "all")


def test_a_larger_limit_draws_a_superset_in_file_order() -> None:
    samples = [sample(number) for number in range(50)]
    few, many = choose(samples, 7, 1), choose(samples, 20, 1)
    assert len(few) == 7
    assert {one.id for one in few} <= {one.id for one in many}
    assert [int(one.id) for one in many] == sorted(int(one.id) for one in many)
    assert choose(samples, None, 1) == samples == choose(samples, 50, 1)


def test_an_unknown_task_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"unknown task vqa; known: {', '.join(TASKS)}"):
        load_task("vqa")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "synthetic"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        load_task(name).load(Source(tmp_path / "missing", tmp_path))
    with pytest.raises(ValueError, match="needs --data"):
        load_task(name).load(Source())


def test_a_wrong_line_is_named_with_what_was_expected(tmp_path: Path) -> None:
    file = write_pope(tmp_path, "yn")
    lines = file.read_text(encoding="utf-8").splitlines()
    cases = {
        "{broken": "line 2: Invalid JSON",
        "[1]": "line 2: Input should be an object",
        json.dumps({"question_id": 1, "image": "a.jpg", "text": "?"}): "line 2: label: Field required",
        lines[0].replace("yes", "maybe"): "line 2: label: Input should be 'yes' or 'no'",
        lines[0].replace("a.jpg", "b.jpg"): r"b.jpg: no such image \(1 of 2 missing\)",
    }
    for line, message in cases.items():
        write_lines(file, lines[0], line)
        with pytest.raises(ValueError, match=message):
            load_task("pope").load(Source(file, tmp_path / "images"))


def test_wrong_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.0\.answers: .* at least 10 items"):
        load_task("textvqa").load(write_textvqa(tmp_path, ["one"]))
    with pytest.raises(ValueError, match=r"problems\.json: 4: expected the index of a choice as answer"):
        load_task("scienceqa").load(Source(write_scienceqa(tmp_path, answer=3)))
    with pytest.raises(ValueError, match="line 2: expected the letter of one of 2 options as answer, got C"):
        load_task("mmbench").load(Source(write_mmbench(tmp_path, answer="C")))
    with pytest.raises(ValueError, match="question 1: expected a base64 image"):
        load_task("mmbench").load(Source(write_mmbench(tmp_path, image="?")))
    with pytest.raises(ValueError, match=r"line 3: expected a second line about b\.jpg"):
        load_task("mme").load(write_mme(tmp_path / "m", *PAIRS[:3]))
    with pytest.raises(ValueError, match="line 1: expected image, question and Yes or No between tabs"):
        load_task("mme").load(write_mme(tmp_path / "m", "a.jpg Is it?"))
    with pytest.raises(ValueError, match=r"q\.json: Invalid JSON: .* line 1"):
        load_task("gqa").load(Source(write_lines(tmp_path / "q.json", "{x"), tmp_path))
