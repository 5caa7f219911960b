"""How commands end: on full devices, closed pipes, narrow terminals, and when a file cannot be written at last."""

import json
import os
import pty
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.command_line import COMMAND, commands, run, the_line
from tests.cli.stub_server import Stub, stub_server
from tests.lab.calibrate.test_calibrate_cli import QUICK
from vllm_hidrop.bench.rows import read_rows
from vllm_hidrop.cli import bench_engines as engines
from vllm_hidrop.cli.app import app

FULL = Path("/dev/full")
CAPACITY = ("capacity", "--tflops", "1", "--bandwidth", "100", "--kv-gib", "20")
PRINTING = (("methods",), ("methods", "--json"), ("plan", "7b"), ("plan", "7b", "--json"), CAPACITY, ("loadtest",))
HELP = (("--help",), ("plan", "--help"), ("bench",), ("eval", "plot", "--help"), ("serve", "--help"))


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as running:
        yield running


@pytest.mark.parametrize("arguments", [*PRINTING, *HELP], ids=" ".join)
def test_a_full_device_is_one_line(arguments: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        assert "No space left on device" in the_line(run(*arguments, stdout=full))


def test_where_nobody_can_be_told_the_exit_code_tells() -> None:
    with FULL.open("w") as full:
        assert run("plan", "7b", "--method", "none-such", stderr=full).returncode == 2
        assert run("methods", stdout=full, stderr=full).returncode == 2


@pytest.mark.parametrize("arguments", [("methods",), ("plan", "7b", "--json"), ("plan", "--help")], ids=" ".join)
def test_a_reader_that_left_ends_a_command_without_a_word(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        ended = run(*arguments, stdout=pipe)
    assert ended.returncode in (1, 141)
    assert ended.stderr == ""


def test_a_closed_standard_output_is_none_of_our_business() -> None:
    ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *COMMAND, "plan", "7b"], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_narrow_terminal_loses_no_word_and_no_number(arguments: tuple[str, ...]) -> None:
    def words(columns: int) -> set[str]:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})
        assert result.exit_code == 0, result.output
        assert "…" not in result.stdout
        return set(re.findall(r"[\w.%/-]*\w[\w.%/-]*", result.stdout))

    assert words(20) == words(60) == words(400)


def test_a_terminals_colours_are_left_out_where_they_are_not_wanted() -> None:
    def shown(**more: str) -> str:
        main, side = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
        process = subprocess.Popen(
            [*COMMAND, "methods"], stdout=side, env=environment | {"TERM": "xterm-256color", "COLUMNS": "80"} | more
        )
        os.close(side)
        text = b""
        try:
            while part := os.read(main, 65536):
                text += part
        except OSError:  # the other side is closed
            pass
        os.close(main)
        assert process.wait(60) == 0
        return text.decode()

    colour = re.compile(r"\x1b\[[\d;]*3[1-7]m|\x1b\[38")
    assert not colour.search(shown(NO_COLOR="1"))
    assert "pyramiddrop" in shown(TERM="dumb")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_characters_still_gets_the_table(encoding: str) -> None:
    ended = run("plan", "7b", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert ended.returncode == 0, ended.stderr
    assert "8396.83" in ended.stdout


# --- What was measured is shown before it is written ------------------------------------------------


def questions(folder: Path) -> Path:
    """One question of the demo."""
    (folder / "a.png").write_bytes(b"\x89PNG")
    line = {"image": "a.png", "question": "what colour ?", "answer": "red"}
    (folder / "questions.jsonl").write_text(json.dumps(line), encoding="utf-8")
    return folder


def test_a_demo_that_cannot_be_written_is_shown(stub: Stub, tmp_path: Path) -> None:
    ended = run("demo", "--url", stub.url, "--examples", questions(tmp_path), "--json", FULL)
    assert "/dev/full: No space left on device" in the_line(ended)
    assert "colour" in ended.stdout
    assert "1 right" in ended.stdout


def test_an_evaluation_that_cannot_be_written_is_shown(stub: Stub) -> None:
    ended = run("eval", "--url", stub.url, "--limit", 7, "--json", FULL)
    assert "/dev/full: No space left on device" in ended.stderr.splitlines()[-1]
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "95 % interval" in ended.stdout


@pytest.mark.parametrize("kind", ["json", "html"])
def test_a_load_test_that_cannot_be_written_is_shown(stub: Stub, tmp_path: Path, kind: str) -> None:
    (tmp_path / f"smoke.{kind}").symlink_to(FULL)
    ended = run("loadtest", "smoke", "--url", stub.url, "--out", tmp_path)
    assert f"smoke.{kind}: No space left on device" in ended.stderr.splitlines()[-1]
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "requests/s" in ended.stdout


def test_a_load_tests_own_files_are_tried_before_it_starts(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "smoke.html").mkdir()
    assert "smoke.html: Is a directory" in the_line(run("loadtest", "smoke", "--url", stub.url, "--out", tmp_path))
    assert not stub.asked.is_set()


def test_an_evaluations_journal_is_tried_before_it_starts(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").mkdir()
    assert "answers.jsonl" in the_line(run("eval", "--url", stub.url, "--limit", 7, "--out", tmp_path))
    assert not stub.asked.is_set()
    (tmp_path / "dense").write_text("a file")
    assert "dense" in the_line(run("eval", "--embedded", "--limit", 7, "--out", tmp_path))


def test_a_calibration_that_cannot_be_written_is_shown(tmp_path: Path) -> None:
    budget = ("--budget", "90")
    for name in ("a.json", "a.curves.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(FULL)
        result = CliRunner().invoke(app, ["calibrate", "embedded", *QUICK, *budget, "--json", str(folder / "a.json")])
        assert result.exit_code == 2, result.output
        assert f"{name}: No space left on device" in result.stderr.splitlines()[-1]
        assert "Mean vision tokens per layer" in result.stdout


def test_a_calibrations_curves_are_tried_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "a.curves.json").mkdir()
    result = CliRunner().invoke(app, ["calibrate", "nowhere", *QUICK, "--json", str(tmp_path / "a.json")])
    assert (result.exit_code, "a.curves.json: Is a directory" in result.stderr) == (2, True)


def test_rows_of_a_bench_that_cannot_be_written_or_that_failed_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = read_rows(Path(__file__).parents[2] / "docs" / "bench.json")[:2]

    def two_then_an_error(*_: object) -> Iterator[dict[str, object]]:
        yield from rows
        raise ValueError("the measured process ended")

    for file, code in ((FULL, "No space left"), (tmp_path / "new" / "rows.json", "the measured process ended")):
        monkeypatch.setattr(engines, "prefill", two_then_an_error)
        result = CliRunner().invoke(app, ["bench", "prefill", "--shape", "tiny", "--json", str(file)])
        assert result.exit_code == 2
        assert code in result.stderr.splitlines()[-1]
        assert all(str(row["name"]).split(",")[0] in result.stdout for row in rows)
    assert read_rows(file) == rows


def test_a_plot_makes_the_folder_that_is_missing(tmp_path: Path) -> None:
    result = {"task": "pope", "accuracy": 0.5, "interval": [0.4, 0.6], "mean_vision_tokens": 64}
    (tmp_path / "a.json").write_text(json.dumps(result))
    png = tmp_path / "not" / "yet" / "a.png"
    assert run("eval", "plot", tmp_path / "a.json", "--png", png).returncode == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "/dev/full: No space" in the_line(run("eval", "plot", tmp_path / "a.json", "--png", FULL))


BAD_RESULTS = [
    b"\xff\xfe",
    b"[1]",
    b"[" * 100_000,
    b'{"task": 1, "accuracy": "a", "interval": [0, 1], "mean_vision_tokens": 1}',
    b'{"task": 1, "accuracy": 1, "interval": [0], "mean_vision_tokens": 1}',
    b'{"task": 1, "accuracy": 1e999, "interval": [0, 1], "mean_vision_tokens": 1}',
    b'{"task": 1, "accuracy": 1, "interval": null, "mean_vision_tokens": 1}',
    b'{"task": 1, "accuracy": 1, "interval": [0, 1], "mean_vision_tokens": ' + b"9" * 400 + b"}",
    b'{"dense": 1, "hidrop": 1, "intervals": [], "mean_vision_tokens": 1, "mean_vision_tokens_dense": 1}',
]


@pytest.mark.parametrize("content", BAD_RESULTS, ids=lambda content: content[:20].decode("latin-1"))
def test_a_result_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    result = CliRunner().invoke(app, ["eval", "plot", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")])
    assert result.exit_code == 2, result.exception
    assert "a.json" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_questions_that_cannot_be_used_are_one_line(stub: Stub, tmp_path: Path) -> None:
    file = questions(tmp_path) / "questions.jsonl"
    for content in (b"", b"\xff", b"[1]", b"[" * 100_000, b'{"image": 1, "question": "", "answer": ""}', b"{}"):
        file.write_bytes(content)
        result = CliRunner().invoke(app, ["demo", "--url", stub.url, "--examples", str(tmp_path)])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), (content, result.exception)
        assert "questions.jsonl" in result.stderr
    assert not stub.asked.is_set()


def test_every_command_is_in_the_group_whose_errors_are_one_line() -> None:
    """The mechanism is the group's; no command has its own."""
    from typer.main import get_command

    from vllm_hidrop.cli.errors import OneLineErrors

    assert isinstance(get_command(app), OneLineErrors)
    assert len(list(commands())) > 15


def test_threads_of_an_evaluation_do_not_outlive_it(stub: Stub, tmp_path: Path) -> None:
    before = threading.active_count()
    result = CliRunner().invoke(app, ["eval", "--url", stub.url, "--limit", "7", "--concurrency", "256"])
    assert result.exit_code == 0, result.output
    assert not [thread for thread in threading.enumerate() if thread.name == "hidrop-eval" and thread.is_alive()]
    assert threading.active_count() <= before + 3
