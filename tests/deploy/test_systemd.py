"""The unit, by systemd's own checks."""

import re
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, accepts

UNIT = DEPLOY / "systemd" / "hidrop.service"
GPU = DEPLOY / "systemd" / "hidrop.service.d" / "gpu.conf"
MOST_EXPOSURE = {"cpu": 1.5, "gpu": 1.9}
"""systemd's figure, 0 (sealed) to 10; 9.6 is a unit that says nothing."""


def settings(text: str) -> dict[str, list[str]]:
    """Every setting, in order; a key may be given several times."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture(params=["cpu", "gpu"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The unit with a program that is on this machine, alone and with the drop-in for a GPU."""
    path = tmp_path / UNIT.name
    more = "\n" + GPU.read_text() if request.param == "gpu" else ""  # `security` would not look for a drop-in
    path.write_text(UNIT.read_text().replace("/opt/hidrop/bin/hidrop", "/bin/true") + more)
    return request.param, path


def test_systemd_finds_no_mistake(unit: tuple[str, Path]) -> None:
    assert accepts("systemd-analyze", "verify", "--man=no", unit[1]) == ""


def test_systemd_calls_the_unit_well_confined(unit: tuple[str, Path]) -> None:
    form, path = unit
    limit = int(MOST_EXPOSURE[form] * 10)
    said = accepts("systemd-analyze", "security", "--offline=true", f"--threshold={limit}", path)
    assert re.search(r"exposure level for hidrop.service: \d\.\d", said)


def test_a_stop_drains_and_leaves_no_process_behind() -> None:
    said = settings(UNIT.read_text())
    assert said["KillMode"] == ["control-group"]
    (start,) = said["ExecStart"]
    drain = int(start.split("--shutdown-timeout ")[1].split()[0])
    assert drain < int(said["TimeoutStopSec"][0])
    assert "-/bin/kill -TERM $MAINPID" in said["ExecStop"]


def test_the_unit_reads_the_settings_that_are_shipped() -> None:
    environment = settings((UNIT.parent / "hidrop.env").read_text())
    (start,) = settings(UNIT.read_text())["ExecStart"]
    assert "$HIDROP_ARGUMENTS" in start
    assert "HIDROP_ARGUMENTS" in environment
    assert environment["VLLM_API_KEY"] == [""]
