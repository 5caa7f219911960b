"""docs/vllm-names.md lists the installed vLLM's names as they are; another vLLM's faults are told by reading it."""

from pathlib import Path

import pytest

from scripts import vllm_names
from scripts.sources import Sources
from scripts.vllm_names import PAGE, difference, installed_vllm, main, names_of, page, sources_with


def test_the_page_shows_the_installed_vllm() -> None:
    found = names_of(sources_with(installed_vllm()))
    assert not found.lacking
    assert not found.refused
    stale = difference(PAGE.read_text(encoding="utf-8"), page(found), (PAGE.name, "installed"))
    assert not stale, f"python -m scripts.vllm_names writes this page anew\n{stale}"


VLLM = {
    "__init__.py": "from .core import *\nfrom vllm.core import run as start",
    "core.py": """
from abc import abstractmethod
class Interface:
    @abstractmethod
    def step(self): ...
class Base(Interface):
    def __init__(self, size: int = 1):
        self.size = size
    def step(self, first, second=None, *, third=0) -> int:
        return 1
    @property
    def free(self): ...
class Made(Base):
    def init(self): ...
def run(model: str, *, eager: bool = False) -> int: ...
""",
}
OURS = {
    "engine.py": """
from vllm import Base, start
class Mixin:
    def step(self, *args, **kwargs): return super().step(*args, **kwargs) + self.free + self.ours
    def ours(self): ...
class Own(Mixin, Base): ...
def work():
    from vllm import core
    core.run('a')
    return start('a')
""",
    "late.py": "def make(base):\n    class Late(base):\n        def init(self): ...\n    return Late",
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """A vLLM of one module, and two files of ours."""
    for package, files in (("vllm", VLLM), ("ours", OURS)):
        (tmp_path / package).mkdir()
        for name, text in files.items():
            (tmp_path / package / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(vllm_names, "OURS", {"ours": tmp_path / "ours"})
    monkeypatch.setattr(vllm_names, "TOUCHED", {"vllm.Base": "size gone"})
    monkeypatch.setattr(vllm_names, "BODIES", {"vllm.core.run": "copied"})
    monkeypatch.setattr(vllm_names, "MADE_AT_RUN_TIME", {"ours.late.Late": ("vllm.core.Made",)})
    return sources_with(tmp_path / "vllm")


def test_names_are_found_through_mixins_stars_functions_and_run_time(names: Sources) -> None:
    found = names_of(names)
    overridden = {ours: {line.split(" ", 1)[1] for line in lines} for ours, lines in found.overridden.items()}
    assert overridden == {
        "ours.engine.Mixin": {"vllm.core.Base.step (self, first, second=None, *, third=0) -> int"},
        "ours.late.Late": {"vllm.core.Made.init (self)"},
    }
    assert found.lines_of_imports == [
        "vllm.Base class, from vllm.core.Base",
        "vllm.core module",
        "vllm.start (model: str, *, eager: bool=False) -> int, from vllm.core.run",
    ]
    assert found.used == {
        "vllm.core.Base.free @property (self)",
        "vllm.core.run (model: str, *, eager: bool=False) -> int",
        "vllm.Base.size attribute, from vllm.core.Base.size",
        "vllm.Base.gone is not there",
    }
    assert found.lacking == {"vllm.Base.gone"}
    assert not found.refused


def test_a_class_made_from_an_argument_must_be_listed(names: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_names, "MADE_AT_RUN_TIME", {})
    with pytest.raises(ValueError, match=r"ours\.late\.Late extends base, an argument"):
        names_of(names)


def test_another_vllm_is_compared_by_reading(
    names: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_names, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(vllm_names, "TOUCHED", {})
    vllm_names.PAGE.write_text(page(names_of(names)), encoding="utf-8")
    assert main(["--vllm", str(tmp_path / "vllm")]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == ""
    assert "every name is there" in told.err
    moved = (
        VLLM["core.py"]
        .replace("def run(", "def walk(")
        .replace("def init(self)", "def init(self, device)")
        .replace("def free(", "def f(")
    )
    (tmp_path / "vllm" / "core.py").write_text(moved, encoding="utf-8")
    assert main(["--vllm", str(tmp_path / "vllm")]) == 1
    told = capsys.readouterr()
    assert "+vllm.core.run is not there" in told.out
    assert "Made.init (self, device)" in told.out
    assert "not there: vllm.core.run: copied" in told.err
    assert "not there: vllm.core.Base.free" in told.err
    assert "ours.late.Late.init takes no device, vllm.core.Made.init does" in told.err
