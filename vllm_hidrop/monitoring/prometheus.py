"""A real Prometheus on loopback: on PATH or unpacked from Debian's package (needs apt, no root), started, asked."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hidrop.cli.local_server import LOOPBACK, answering, free_port

READY_SECONDS = 60.0
ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Tools:
    """Paths of the two programs."""

    prometheus: Path
    promtool: Path


def find_tools(cache: Path | None = None) -> Tools:
    """Prometheus and promtool, by :func:`find_programs`."""
    return Tools(*find_programs("prometheus", ("prometheus", "promtool"), cache))


def find_programs(package: str, names: Sequence[str], cache: Path | None = None) -> list[Path]:
    """Programs on PATH, else of a Debian package fetched once into ``cache``. Raises ValueError: neither, with why."""
    installed = [shutil.which(name) for name in names]
    if all(installed):
        return [Path(path) for path in installed if path]
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm_hidrop" / package
    programs = [folder / "usr" / "bin" / name for name in names]
    if not all(program.is_file() for program in programs):
        _fetch(package, folder, programs)
    return programs


def _fetch(package: str, folder: Path, programs: Sequence[Path]) -> None:
    """Unpack a package into ``folder``, whole or not at all; of several processes that want it, one does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent, os.O_RDONLY)  # the folder itself: a file of locks would stay
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(program.is_file() for program in programs):
            _unpack(package, folder)
    finally:
        os.close(lock)


def _unpack(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as name:
        work = Path(name)
        _run(["apt-get", "-o", "Acquire::Retries=3", "download", package], work, package)
        packages = list(work.glob("*.deb"))
        if len(packages) != 1:
            raise ValueError(f"apt-get download {package} left {len(packages)} packages, not one")
        _run(["dpkg-deb", "-x", packages[0].name, "unpacked"], work, package)
        if folder.exists():
            shutil.rmtree(folder)
        (work / "unpacked").rename(folder)


def _run(command: Sequence[str], folder: Path, package: str) -> None:
    advice = f"Debian's package {package} is not installed, and fetching it failed"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    except OSError as error:
        raise ValueError(f"{advice}: {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{advice}: {' '.join(command)}: {last} (apt-get update may be needed first)")


@dataclass(frozen=True)
class Series:
    """One line of an answer: labels, and (seconds since 1970, value) pairs."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, by its address."""

    url: str

    def query(self, expr: str) -> list[Series]:
        """The value of an expression now. Raises ValueError: Prometheus does not understand it."""
        found = self._ask("query", {"query": expr})
        if found["resultType"] == "scalar":
            return [Series({}, (_point(found["result"]),))]
        return [Series(each["metric"], (_point(each["value"]),)) for each in found["result"]]

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """Values every ``step`` seconds. Raises ValueError: Prometheus does not understand the expression."""
        found = self._ask("query_range", {"query": expr, "start": start, "end": end, "step": step})
        return [Series(each["metric"], tuple(map(_point, each["values"]))) for each in found["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health and last error."""
        return [rule for group in self._ask("rules", {})["groups"] for rule in group["rules"]]

    def _ask(self, what: str, values: dict[str, Any]) -> Any:
        try:
            url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(values)}"
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"Prometheus: {json.load(error)['error']}: {values}") from None


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


@contextmanager
def running(
    targets: Sequence[str],
    rules: Path | None = None,  # a rule file
    scrape_seconds: float = 1.0,  # between scrapes, and between evaluations of the rules
    on_wait: Callable[[], None] = lambda: None,  # called a few times a second until it is ready
    tools: Tools | None = None,  # default: those of find_tools()
) -> Iterator[Prometheus]:
    """Run one that scrapes ``targets`` as job "hidrop", then delete its data. Raises ValueError: it cannot start."""
    tools = tools or find_tools()
    with tempfile.TemporaryDirectory(prefix="hidrop-prometheus-") as name:
        folder = Path(name)
        config = folder / "prometheus.json"  # JSON is YAML
        config.write_text(json.dumps(_config(targets, rules, scrape_seconds)), encoding="utf-8")
        place = f"{LOOPBACK}:{free_port()}"
        command = [
            str(tools.prometheus),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={place}",
            "--log.level=warn",
        ]
        with answering("Prometheus", command, f"http://{place}/-/ready", on_wait, seconds=READY_SECONDS):
            yield Prometheus(f"http://{place}")


def _config(targets: Sequence[str], rules: Path | None, scrape_seconds: float) -> dict[str, Any]:
    every = f"{round(scrape_seconds * 1000)}ms"
    return {
        "global": {"scrape_interval": every, "evaluation_interval": every, "scrape_timeout": every},
        "rule_files": [str(rules.resolve())] if rules else [],
        "scrape_configs": [{"job_name": "hidrop", "static_configs": [_target(each) for each in targets]}],
    }


def _target(address: str) -> dict[str, Any]:
    """The scrape target of a server; one behind a path is scraped below it."""
    parts = urllib.parse.urlsplit(address)
    labels = {"__scheme__": parts.scheme, "__metrics_path__": f"{parts.path}/metrics"}
    return {"targets": [parts.netloc], "labels": labels}
