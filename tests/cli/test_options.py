"""What options refuse before anything starts: files, addresses and numbers, over all commands the parser knows."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.command_line import Option, options
from tests.lab.evaluate.stub_server import Stub, serving
from vllm_hidrop.cli.app import app

READ = {"--examples", "--file", "--data", "--images", "--vision-tower", "source", "results", "config"}
"""Paths that commands read; every other one is written."""


WRITTEN = [option for option in options() if option.kind in (Path, list[Path]) and option.name not in READ]
FOLDERS = {"--out", "destination"}
NUMBERS = [option for option in options() if option.kind in (int, float, list[int], list[float])]
ADDRESSES = [option for option in options() if option.name in ("--url", "--compare")]


def refusal(*arguments: object) -> str:
    """The line of a command that was refused while its command line was read."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def given(option: Option, value: object) -> tuple[object, ...]:
    """The command with the option and nothing else; an argument of `convert` stands behind its source."""
    if option.name.startswith("-"):
        return (*option.command, option.name, value)
    return (*option.command, "source", value)


def test_the_tables_are_not_empty() -> None:
    names = {str(option) for option in WRITTEN}
    assert {"demo --json", "bench serve --png", "calibrate --json", "loadtest --out", "eval plot --png"} <= names
    assert {"monitor --png", "eval --out", "bench train --json", "convert destination"} <= names
    assert {str(option) for option in ADDRESSES} == {
        *("demo --url", "monitor --url", "loadtest --url", "loadtest --compare", "eval --url")
    }
    assert len(NUMBERS) > 40


@pytest.mark.parametrize("option", WRITTEN, ids=str)
def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(option: Option, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("as it was")
    places: dict[object, str] = {
        file / "below": "Not a directory",
        "/proc/none/here": "no file can be made in it",
        "/dev/full/here": "Not a directory",
        tmp_path / ("n" * 300): "File name too long",
    }
    if option.name in FOLDERS:
        places |= {file: "Not a directory", "/dev/full": "Not a directory"}
    else:
        places |= {tmp_path: "Is a directory", "": "Is a directory"}
    for place, reason in places.items():
        line = refusal(*given(option, place))
        assert reason in line
        assert line.startswith(f"hidrop: {option.name} ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "as it was"


NO_ADDRESSES = {
    "127.0.0.1:8000": "it has no http:// or https://",
    "localhost:8000": "it has no http:// or https://",
    "http:127.0.0.1": "it has no http:// or https://",
    "ftp://127.0.0.1": "it has no http:// or https://",
    "": "it has no http:// or https://",
    "http://": "it names no host",
    "http://:8000": "it names no host",
    "http://127.0.0.1:99999": "Port out of range",
    "http://127.0.0.1:-1": "Port",
    "http://127.0.0.1:0": "port 0",
    "http://127.0.0.1:http": "Port could not be cast",
    "http://me:secret@127.0.0.1": "it holds a name or a password",
    "http://127.0.0.1/?key=1": "it has a query or a fragment",
    "http://127.0.0.1/#a": "it has a query or a fragment",
    "http://127.0.0.1/a b": "it has spaces",
    "http://127.0.\n0.1": "it has spaces",
    "http://[::1": "Invalid IPv6",
    "http://127.0.0.1/<a>": "its path cannot be one",
    "http://a/b!": "its path cannot be one",
    "http://a$b": "its host cannot be one",
}


@pytest.mark.parametrize("option", ADDRESSES, ids=str)
def test_what_is_no_address_is_refused_alike_by_every_command(option: Option) -> None:
    scenario = ("smoke",) if option.command == ("loadtest",) else ()
    for text, reason in NO_ADDRESSES.items():
        line = refusal(*given(option, text), *scenario)
        assert line.startswith(f"hidrop: {option.name}: ")
        assert reason in line
        assert "secret" not in line


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/v1", "{}//v1///", " {} "])
def test_slashes_and_v1_at_the_end_of_an_address_change_nothing(written: str, tmp_path: Path) -> None:
    from tests.cli.stub_server import stub_server
    from tests.lab.evaluate.benchmark_files import write_pope

    write_pope(tmp_path, "y")
    with serving(Stub(lambda question, before: "Yes")) as stub:
        files = ("--task", "pope", "--data", tmp_path / "coco_pope_random.json", "--images", tmp_path / "images")
        url = written.format(stub.url.replace("http", "HTTP"))
        result = CliRunner().invoke(app, ["eval", "--url", url, *map(str, files)])
    assert result.exit_code == 0, result.output
    with stub_server() as other:
        url = written.format(other.url.replace("http", "Http"))
        result = CliRunner().invoke(app, ["loadtest", "smoke", "--url", url, "--out", str(tmp_path / "runs")])
    assert (tmp_path / "runs" / "smoke.json").is_file(), result.output


@pytest.mark.parametrize("option", NUMBERS, ids=str)
def test_a_number_beyond_reason_is_refused(option: Option) -> None:
    values: list[Any] = [10**400, -(10**400), "nan", "inf", "-inf", "1e999", "9" * 5000, ""]
    for value in values:
        result = CliRunner().invoke(app, [*option.command, f"{option.name}={value}"], env={"COLUMNS": "200"})
        assert result.exit_code == 2, (value, result.output, result.exception)
        assert option.name in result.stderr, result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("option", ["--images", "--batch", "--text"])
def test_counts_by_comma_beyond_reason_are_refused(option: str) -> None:
    command = "decode" if option == "--batch" else "prefill"
    for value in (10**400, "nan", "1,,2", "-1", "1e3", "²"):
        assert option in refusal("bench", command, f"{option}={value}")


JSON = ["--options", "--xargs"]


@pytest.mark.parametrize("option", [each for each in options() if each.name in JSON], ids=str)
def test_json_of_every_kind_of_wrong_is_refused(option: Option) -> None:
    needed: dict[tuple[str, ...], tuple[object, ...]] = {
        ("capacity",): ("--tflops", 1, "--bandwidth", 1, "--kv-gib", 1),
        ("eval",): ("--url", "http://127.0.0.1:9"),
    }
    more = needed.get(option.command, ())
    for value in ("[" * 100_000, "[1]", "{", "", '{"a":' + "9" * 5000 + "}", "null", '{"a": nan}', "\udc80"):
        assert option.name in refusal(*option.command, *more, option.name, value)
