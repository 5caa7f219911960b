"""A program that is fetched from Debian is fetched once, whoever else wants it at the same time."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_hidrop.monitoring.prometheus import find_programs

APT_GET = """#!/bin/sh
echo fetched >> "{log}"
sleep 0.5
touch a.deb
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr/bin" && touch "$3/usr/bin/no-such-program"
"""


def test_two_that_want_a_program_at_once_fetch_it_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    for name, script in (("apt-get", APT_GET.format(log=log)), ("dpkg-deb", DPKG)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with ThreadPoolExecutor(4) as pool:
        cache = tmp_path / "cache"
        found = list(pool.map(lambda _: find_programs("a-package", ["no-such-program"], cache), range(4)))
    assert all(program.is_file() for (program,) in found)
    assert log.read_text() == "fetched\n"
