"""The machinery through the command line, against a real HTTP server."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lab.evaluate.benchmark_files import write_pope
from tests.lab.evaluate.stub_server import MEAN_VISION_TOKENS, Stub, serving
from vllm_hidrop.lab.evaluate import endpoint

COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()", "eval")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def ask_pope(stub: Stub, folder: Path, *more: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Evaluate the folder's POPE file; the ended command and its figures, empty if it wrote none."""
    file = folder / "result.json"
    file.unlink(missing_ok=True)
    files = ("--data", folder / "coco_pope_random.json", "--images", folder / "images", "--json", file)
    ended = run("--url", stub.url, "--task", "pope", *files, *more)
    return ended, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def always_yes(question: str, asked_before: int) -> str:
    return "Yes"


def test_accuracy_intervals_and_reported_tokens_are_written(tmp_path: Path) -> None:
    write_pope(tmp_path, "yyyn")
    with serving(Stub(always_yes)) as stub:
        ended, result = ask_pope(stub, tmp_path, "--off", "--api-key", "secret", "--xargs", '{"note": 1}')
    assert ended.returncode == 0, ended.stderr
    assert (result["accuracy"], result["questions"], result["failed"]) == (0.75, 4, 0)
    assert result["figures"] == {"precision": 0.75, "recall": 1, "f1": 1.5 / 1.75, "yes_ratio": 1}
    assert result["mean_vision_tokens"] == MEAN_VISION_TOKENS
    low, high = result["interval"]
    assert low <= 0.75 <= high
    assert {body["temperature"] for body in stub.bodies} == {0}
    assert {body["max_tokens"] for body in stub.bodies} == {16}
    assert stub.bodies[0]["vllm_xargs"] == {"note": 1, "hidrop": "off"}
    assert {header["authorization"] for header in stub.headers} == {"Bearer secret"}
    assert "75.0 %" in ended.stdout
    assert result["versions"]["openai"]


def test_any_other_server_is_sent_nothing_of_ours_and_reports_no_tokens(tmp_path: Path) -> None:
    write_pope(tmp_path, "y")
    with serving(Stub(always_yes, reports=False)) as stub:
        ended, result = ask_pope(stub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert result["mean_vision_tokens"] is None
    assert "vllm_xargs" not in stub.bodies[0]


def test_a_failure_that_passes_is_retried_and_one_that_stays_is_counted(tmp_path: Path) -> None:
    write_pope(tmp_path, "yyyy")

    def answer(question: str, asked_before: int) -> str | int:
        if "thing 0" in question and asked_before == 0:
            return 503
        return 400 if "thing 1" in question else 500 if "thing 2" in question else "yes"

    with serving(Stub(answer)) as stub:
        ended, result = ask_pope(stub, tmp_path, "--out", tmp_path / "out")
        counts = {question.partition("thing ")[2][0]: count for question, count in stub.asked.items()}
        assert counts == {"0": 2, "1": 1, "2": 3, "3": 1}
        assert ended.returncode == 1
        assert "2 of 4 requests failed and count as wrong" in ended.stdout
        assert (result["failed"], result["accuracy"], result["figures"]["recall"]) == (2, 0.5, 0.5)
        stub.answer = always_yes
        ended, result = ask_pope(stub, tmp_path, "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stdout
    assert (result["failed"], result["accuracy"]) == (0, 1)
    assert sum(stub.asked.values()) == 7 + 2


def test_a_second_run_asks_only_what_is_missing_even_after_a_kill(tmp_path: Path) -> None:
    write_pope(tmp_path, "ynynyn")
    out = tmp_path / "out"
    with serving(Stub(always_yes)) as stub:
        _, few = ask_pope(stub, tmp_path, "--out", out, "--limit", 4)
        assert few["questions"] == sum(stub.asked.values()) == 4
        journal = out / "answers.jsonl"
        text = journal.read_text(encoding="utf-8")
        journal.write_text(text[:-10], encoding="utf-8")  # as if killed in the middle of its last line
        ended, all_of_them = ask_pope(stub, tmp_path, "--out", out)
        assert ended.returncode == 0, ended.stderr
        assert sum(stub.asked.values()) == 6 + 1
        assert (all_of_them["questions"], all_of_them["accuracy"]) == (6, 0.5)
        _, again = ask_pope(stub, tmp_path, "--out", out)
        assert sum(stub.asked.values()) == 6 + 1
    assert {**again, "date": ""} == {**all_of_them, "date": ""}


def test_answers_under_other_settings_or_to_other_questions_are_refused(tmp_path: Path) -> None:
    file = write_pope(tmp_path, "yn")
    with serving(Stub(always_yes)) as stub:
        ask_pope(stub, tmp_path, "--out", tmp_path / "out")
        ended, _ = ask_pope(stub, tmp_path, "--out", tmp_path / "out", "--off")
        assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (2, 1)
        assert 'xargs was {}, is {"hidrop": "off"}' in ended.stderr
        file.write_text(file.read_text(encoding="utf-8").replace("thing 0", "cat"), encoding="utf-8")
        ended, _ = ask_pope(stub, tmp_path, "--out", tmp_path / "out")
        assert ended.returncode == 2
        assert "the data changed since sample random/0 was asked" in ended.stderr
        assert sum(stub.asked.values()) == 2


def test_no_more_requests_than_allowed_run_at_once(tmp_path: Path) -> None:
    write_pope(tmp_path, "y" * 12)

    def slow(question: str, asked_before: int) -> str:
        time.sleep(0.1)
        return "yes"

    with serving(Stub(slow)) as stub:
        ended, _ = ask_pope(stub, tmp_path, "--concurrency", 3)
    assert ended.returncode == 0, ended.stderr
    assert 2 <= stub.most_active <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --url or --embedded"),
        (("--embedded", "--off"), "--embedded chooses"),
        (("--url", "http://127.0.0.1:9"), "no model at http://127.0.0.1:9"),
        (("--url", "http://127.0.0.1:9", "--task", "vqa"), "unknown task vqa; known: synthetic, pope"),
        (("--url", "http://127.0.0.1:9", "--off", "--xargs", '{"hidrop": "on"}'), "not both"),
        (("--url", "http://127.0.0.1:9", "--task", "gqa", "--data", "nowhere.json"), "nowhere.json: No such file"),
        (("plot", "nowhere.json", "--png", "a.png"), "nowhere.json: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_model_that_is_not_served_is_refused_with_those_that_are(tmp_path: Path) -> None:
    write_pope(tmp_path, "y")
    with serving(Stub(always_yes)) as stub:
        ended, _ = ask_pope(stub, tmp_path, "--model", "other")
    assert ended.returncode == 2
    assert "serves stub, not other" in ended.stderr


def test_results_are_plotted(tmp_path: Path) -> None:
    write_pope(tmp_path, "yn")
    with serving(Stub(always_yes)) as stub:
        ask_pope(stub, tmp_path)
    comparison: dict[str, Any] = {
        "dense": 0.9,
        "hidrop": 0.8,
        "mean_vision_tokens": 50.0,
        "mean_vision_tokens_dense": 576.0,
    }
    comparison |= {"intervals": {"dense": [0.8, 0.95], "hidrop": [0.7, 0.9]}}
    (tmp_path / "both.json").write_text(json.dumps(comparison), encoding="utf-8")
    ended = run("plot", tmp_path / "result.json", tmp_path / "both.json", "--png", tmp_path / "plot.png")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_mean_vision_tokens_weighs_stages_by_their_layers() -> None:
    stages = [
        {"first_layer": 0, "end_layer": 1, "kept": 10},
        {"first_layer": 1, "end_layer": 4, "kept": 2},
    ]
    assert endpoint.mean_vision_tokens({"stages": stages}) == 4
    assert endpoint.mean_vision_tokens(None) is None


def test_an_image_of_no_known_kind_is_an_error() -> None:
    assert endpoint.data_url(b"\xff\xd8\xff0").startswith("data:image/jpeg;base64,")
    with pytest.raises(ValueError, match="expected a PNG"):
        endpoint.data_url(b"text")
