"""The images, as far as they can be judged without a Docker engine."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, ROOT, accepts

DOCKERFILES = [DEPLOY / "docker" / name for name in ("Dockerfile.cpu", "Dockerfile.cuda")]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined, of the last stage and the ones before."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def copied(path: Path) -> set[str]:
    """What the build takes from the repository."""
    plain = [words.split()[:-1] for name, words in instructions(path) if name == "COPY" and "--from" not in words]
    return {source for sources in plain for source in sources}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert accepts("hadolint", "--failure-threshold", "style", path) == ""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_without_root_and_asks_its_own_health(path: Path) -> None:
    stage = dict(last_stage(path))
    user = int(stage["USER"].split(":")[0])
    assert user >= 10_000
    assert "127.0.0.1:8000/health'" in stage["HEALTHCHECK"]
    assert '"--port", "8000"' in stage["CMD"]
    assert stage["ENTRYPOINT"] == '["hidrop", "serve"]'


def test_the_cuda_image_is_vllms_own_of_the_version_we_extend() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["cuda"]
    assert last_stage(DOCKERFILES[1])[0] == ("FROM", f"vllm/vllm-openai:v{wanted.removeprefix('vllm==')}")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_build_copies_is_in_its_context(path: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied(path)
    assert copied(path) <= allowed
    assert all((ROOT / source).exists() for source in copied(path))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_build_copies_is_enough_for_the_wheel(path: Path, tmp_path: Path) -> None:
    for source in copied(path) - {
        "requirements-cpu.lock",
        "deploy/docker/test_tools.txt",
        "scripts/mend_torchvision.py",
    }:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        copy(ROOT / source, tmp_path / "context" / source if copy is shutil.copytree else _parent(tmp_path, source))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", tmp_path, tmp_path / "context"], check=True, timeout=120, env=_quiet())
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hidrop_server/__init__.py", "hidrop_loadtests/scenarios.toml", "vllm_hidrop/plugin.py"} <= set(names)


def test_the_cpu_image_leaves_out_the_tools_of_tests_and_documentation_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {extra: {_name(line) for line in lines} for extra, lines in project["optional-dependencies"].items()}
    needed = names["cpu"] | names["train"] | names["loadtests"] | {_name(line) for line in project["dependencies"]}
    needed |= {"hatchling", "psutil", "anthropic", "cryptography"}  # the first builds the wheel; vLLM needs the others
    tools = (names["dev"] | names["docs"]) - needed
    patterns = (DEPLOY / "docker" / "test_tools.txt").read_text().split()
    lock = [line for line in (ROOT / "requirements-cpu.lock").read_text().splitlines() if not line.startswith("#")]
    left_out = {_name(line) for line in lock if any(re.match(pattern, line) for pattern in patterns)}
    assert left_out <= tools
    unmatched = {tool for tool in tools if not any(re.match(pattern, f"{tool}==1") for pattern in patterns)}
    assert not unmatched, f"add them to deploy/docker/test_tools.txt: {sorted(unmatched)}"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def _parent(directory: Path, source: str) -> Path:
    path = directory / "context" / source
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _quiet() -> dict[str, str]:
    return os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
