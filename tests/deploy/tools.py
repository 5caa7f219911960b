"""The validators: those from PyPI are installed with the tests, Debian's may be missing."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DEBIAN_PACKAGES = {
    "promtool": "prometheus",
    "amtool": "prometheus-alertmanager",
    "systemd-analyze": "systemd",
}


def tool(name: str) -> str:
    """Path of a program; skips the test where Debian's package is missing, fails where PyPI's is."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None and name in DEBIAN_PACKAGES:
        pytest.skip(f"NOT VALIDATED: {name} is missing (apt-get install {DEBIAN_PACKAGES[name]})")
    assert found is not None, f"{name} is missing: install the dev extra"
    return found


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A validator's run, which nothing but itself may end."""
    name, *arguments = map(str, command)
    return subprocess.run(
        [tool(name), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def accepts(*command: str | Path, **more: Any) -> str:
    """Standard output of a validator that must find nothing."""
    found = run(*command, **more)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """What a YAML stream holds."""
    return [document for document in yaml.safe_load_all(text) if document]


def files(*suffixes: str, under: Path = DEPLOY) -> Sequence[Path]:
    """Every file of ours with one of these endings."""
    return sorted(path for path in under.rglob("*") if path.suffix in suffixes)
