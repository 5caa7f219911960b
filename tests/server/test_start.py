"""Choices that `hidrop serve` cannot honour end in one line and exit code 2, before anything is served."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from hidrop_server.errors import StartError
from vllm_hidrop.cli.options import Choice
from vllm_hidrop.embedded import MODEL_DIR

COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def refusal(*arguments: str) -> str:
    """The one line a refused start says."""
    ended = run("serve", *arguments)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith(("hidrop serve: ", "hidrop: "))]
    assert lines == ended.stderr.splitlines()[-1:], ended.stderr
    return lines[0]


class Refused(NamedTuple):
    """Arguments, and a part of the line they end with."""

    says: str
    arguments: tuple[str, ...]


BEFORE_VLLM = {
    "unknown method": Refused("known: none, hidrop", ("--method", "hydrop")),
    "unknown preset": Refused("no preset 'tok1'", ("--method", "hidrop", "--preset", "tok1")),
    "unknown key": Refused(
        "known keys: method, preset, options, positions, prefix_state_bytes, force",
        ("--hidrop-config", '{"metod": "none"}'),
    ),
    "unknown option": Refused("no option 'kept'", ("--hidrop-config", '{"method": "fastv", "options": {"kept": 0.5}}')),
    "not JSON": Refused("not JSON", ("--hidrop-config", "{method: fastv}")),
    "no such file": Refused("No such file", ("--hidrop-config", "nowhere.json")),
}


FILES_THAT_ARE_NONE = {
    "binary": (b"\xff\xfe{}", "not UTF-8 text"),
    "deeply nested": (b"{" * 100_000, "not JSON"),
    "deeply nested lists": (b"[" * 100_000, "nested too deeply"),
    "huge": (b'{"method": "none"' + b" " * 2**20 + b"}", "longer than 1 MiB"),
    "a list": (b"[1]", "must be a JSON object"),
    "a long number": (b'{"prefix_state_bytes": ' + b"9" * 5000 + b"}", "not JSON"),
    "empty": (b"", "not JSON"),
}


@pytest.mark.parametrize("name", [*FILES_THAT_ARE_NONE, "a directory", "no end"])
def test_a_configuration_file_of_every_kind_of_wrong_is_refused(name: str, tmp_path: Path) -> None:
    file, reason = tmp_path / "config.json", {"a directory": "Is a directory"}.get(name, "longer than 1 MiB")
    if name == "a directory":
        file.mkdir()
    elif name == "no end":
        file = Path("/dev/zero")
    else:
        content, reason = FILES_THAT_ARE_NONE[name]
        file.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refused:
        Choice(hidrop_config=str(file)).read()
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", BEFORE_VLLM)
def test_a_misspelt_choice_is_refused_before_vllm_is_imported(name: str) -> None:
    case = BEFORE_VLLM[name]
    assert case.says in refusal(*case.arguments)


KEEPS_THAT_RISE = '{"method": "hidrop", "preset": "embedded", "options": {"keeps": [10, 20]}}'

WITH_VLLM = {
    "another model's preset": Refused("was trained for", ("--method", "hidrop", "--preset", "tok64")),
    "keeps that rise": Refused("must not rise", ("--hidrop-config", KEEPS_THAT_RISE)),
    "a flag nobody has": Refused("--nonsense", ("--nonsense", "3")),
    "a setting pruning would break": Refused("--enable-lora", ("--enable-lora",)),
    "a launcher of vLLM's": Refused("--headless", ("--headless",)),
    "no process at all": Refused("--api-server-count", ("--api-server-count", "0")),
}


@pytest.mark.server
@pytest.mark.parametrize("name", WITH_VLLM)
def test_a_choice_that_does_not_fit_is_refused_before_the_engine_starts(name: str) -> None:
    case = WITH_VLLM[name]
    assert case.says in refusal(*case.arguments)


@contextmanager
def taken_port() -> Iterator[int]:
    """A loopback port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def listening_refusal(*arguments: str) -> str:
    """Why a server would not be started, by the check that comes before the model is looked at."""
    from hidrop_server.control.arguments import parse
    from hidrop_server.http.listening import check_listening

    with pytest.raises(StartError) as refused:
        check_listening(parse(None, list(arguments)))
    return str(refused.value)


def test_where_a_server_cannot_listen_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no socket")
    with taken_port() as port:
        cases = {
            ("--host", "127.0.0.1", "--port", str(port)): "Address already in use",
            ("--host", "127.0.0.1", "--port", "99999"): "port must be 0-65535",
            ("--host", "127.0.0.1", "--port", str(10**30)): "",
            ("--host", "127.0.0.1", "--port=-1"): "port must be 0-65535",
            ("--host", "nonsense.invalid"): "",
            ("--host", "a" * 300): "",
            ("--host", "203.0.113.1"): "Cannot assign requested address",
            ("--uds", "/proc/none"): "No such file",
            ("--uds", str(tmp_path / "file")): "Address already in use",
            ("--uds", str(tmp_path / "file" / "below")): "Not a directory",
            ("--uds", "/" + "u" * 200): "too long",
        }
        for arguments, reason in cases.items():
            line = listening_refusal(*arguments)
            assert line.startswith(f"cannot listen on {arguments[0].partition('=')[0]} ")
            assert reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_certificates_are_read_before_the_engine_starts(tmp_path: Path) -> None:
    no_pem = tmp_path / "no.pem"
    no_pem.write_bytes(b"\xff")
    free = ("--host", "127.0.0.1", "--port", "0")
    for arguments, reason in {
        ("--ssl-certfile", "/nowhere"): "/nowhere for TLS: No such file",
        ("--ssl-certfile", str(no_pem)): "for TLS",
        ("--ssl-certfile", str(tmp_path)): "for TLS",
        ("--ssl-keyfile", str(no_pem)): "--ssl-keyfile needs --ssl-certfile",
    }.items():
        assert reason in listening_refusal(*free, *arguments)


def test_a_socket_that_was_tried_is_there_for_the_server(tmp_path: Path) -> None:
    from hidrop_server.control.arguments import parse
    from hidrop_server.http.listening import check_listening

    for arguments in (["--uds", str(tmp_path / "a.sock")], ["--host", "127.0.0.1", "--port", "0"]):
        check_listening(parse(None, arguments))
        check_listening(parse(None, arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.server
def test_a_logging_configuration_that_is_none_is_refused() -> None:
    flag = "--logging-config.pylogging_config_file"
    assert "hidrop serve: --logging-config: " in refusal("--host", "127.0.0.1", "--port", "0", flag, "/nowhere")


@pytest.mark.server
def test_a_port_that_is_taken_ends_the_command_in_one_line() -> None:
    with taken_port() as port:
        line = refusal("--host", "127.0.0.1", "--port", str(port))
    assert line == f"hidrop serve: cannot listen on --host 127.0.0.1 --port {port}: Address already in use"


@pytest.mark.server
def test_a_family_that_cannot_run_staged_is_refused(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))["text_config"]
    config |= {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refusal(str(tmp_path), "--method", "fastv")
    assert "LlamaForCausalLM" in line
    assert "supported: LLaVA-1.5, LLaVA-NeXT" in line


def test_help_shows_our_options_and_the_way_to_vllms() -> None:
    ended = run("serve", "--help")
    assert ended.returncode == 0
    for option in ("--method", "--preset", "--options", "--force", "--hidrop-config", "--vllm-help"):
        assert option in ended.stdout
