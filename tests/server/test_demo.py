"""`hidrop demo` against the running server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.harness import IMAGE_TOKENS, QUESTION, Server, kept, picture

pytestmark = pytest.mark.server
COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()", "demo")


def write_questions(folder: Path, images: list[bytes]) -> None:
    lines = []
    for index, file in enumerate(images):
        (folder / f"{index}.png").write_bytes(file)
        lines.append(json.dumps({"image": f"{index}.png", "question": QUESTION, "answer": "red"}))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run(server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--url", server.url, "--examples", str(folder), "--json", str(folder / "out.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_question_is_answered_dense_and_pruned(server: Server, tmp_path: Path) -> None:
    write_questions(tmp_path, [picture(1), picture(2)])
    ended = run(server, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(rows) == 2
    for row in rows:
        assert set(kept(row["dense"]["report"])) == {IMAGE_TOKENS}
        assert kept(row["pruned"]["report"]) == list(server.schedule.kept(IMAGE_TOKENS))
        assert row["pruned"]["seconds_to_first_token"] > 0
        assert row["dense"]["text"]
    blocks = sum(row["pruned"]["report"]["kv_blocks"] for row in rows)
    dense_blocks = sum(row["dense"]["report"]["kv_blocks"] for row in rows)
    assert f"{blocks} / {dense_blocks}" in ended.stdout


def test_a_failed_request_is_shown_and_ends_with_exit_code_1(server: Server, tmp_path: Path) -> None:
    write_questions(tmp_path, [picture(1), b"no image"])
    ended = run(server, tmp_path)
    assert ended.returncode == 1
    assert "2 of 4 requests failed" in ended.stdout
    assert "HTTP 400" in ended.stdout


def test_a_missing_folder_is_one_line(server: Server, tmp_path: Path) -> None:
    ended = run(server, tmp_path / "nowhere")
    assert ended.returncode == 2
    assert ended.stderr.startswith("hidrop: ")
    assert len(ended.stderr.splitlines()) == 1
