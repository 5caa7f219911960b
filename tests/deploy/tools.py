"""The validators: from PyPI, installed with the tests, and from Debian, fetched where they are missing."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_hidrop.monitoring.prometheus import find_programs

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DEBIAN_PACKAGES = {"promtool": "prometheus", "amtool": "prometheus-alertmanager"}


def tool(name: str) -> str:
    """Path of a program; only systemd's, which is no package of its own, may be missing."""
    if name in DEBIAN_PACKAGES:
        return str(find_programs(DEBIAN_PACKAGES[name], [name])[0])
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None and name == "systemd-analyze":
        pytest.skip("NOT VALIDATED: systemd-analyze is missing (apt-get install systemd)")
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
