"""Who may import whom, read from the source with `ast`.

Ruled are imports of our packages, of vLLM and of PyTorch; other libraries are free. A string that
names a module (a registry row, an entry point) is not an import.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIRECTORIES = {
    "vllm_hidrop": ROOT / "vllm_hidrop",
    "hidrop_server": ROOT / "server",
    "hidrop_loadtests": ROOT / "loadtests",
}
# `server` and the like are names of directories: importing them would load the same code twice.
RULED = (*DIRECTORIES, "vllm", "torch", "server", "loadtests", "editable")


@dataclass(frozen=True)
class Rule:
    """What a module, and every module below it, may import besides itself.

    always: prefixes allowed anywhere; lazily: also these inside functions and `if TYPE_CHECKING:`.
    """

    always: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()


# Of the command line's edges: no model, no method, nothing of ours.
EDGES = ("vllm_hidrop.json_text", "vllm_hidrop.outputs", "vllm_hidrop.terminal")
PLAN = ("vllm_hidrop.plan",)
# What the engine knows of methods: their contract, never one of them.
CONTRACT = ("vllm_hidrop.methods.adaptive", "vllm_hidrop.methods.base", "vllm_hidrop.methods.scoring", *PLAN)
METHODS = ("vllm_hidrop.methods", *PLAN)
CONFIG = ("vllm_hidrop.config", *METHODS)
STAGED = ("vllm_hidrop.staged", *CONTRACT)
ENGINE = ("vllm_hidrop.engine", *STAGED)
RUNNERS = ("vllm_hidrop.runners", *ENGINE)
MODELS = ("vllm_hidrop.models", *CONFIG, *RUNNERS)
EVERYTHING = (*DIRECTORIES, "torch", "vllm")

# The longest prefix rules a module. A module without a row fails: where it belongs is a decision.
RULES = {
    "vllm_hidrop.plan": Rule(),
    "vllm_hidrop.methods": Rule((*PLAN, "torch")),
    "vllm_hidrop.config": Rule(METHODS),
    "vllm_hidrop.staged": Rule((*CONTRACT, "torch", "vllm")),
    "vllm_hidrop.engine": Rule((*STAGED, "torch", "vllm")),
    "vllm_hidrop.engine.configure": Rule((*CONFIG, *ENGINE, "vllm_hidrop.runners.tower_attention", "vllm")),
    "vllm_hidrop.engine.model_checks": Rule(CONFIG),
    "vllm_hidrop.runners": Rule((*ENGINE, "torch", "vllm")),
    "vllm_hidrop.models": Rule((*CONFIG, *RUNNERS, "torch", "vllm")),
    "vllm_hidrop.plugin": Rule(lazily=(*MODELS, "torch", "vllm")),
    "vllm_hidrop.json_text": Rule(),
    "vllm_hidrop.outputs": Rule(),
    "vllm_hidrop.terminal": Rule(),
    "vllm_hidrop.cli": Rule(("vllm_hidrop.bench", "vllm_hidrop.lab.evaluate", *EDGES, *CONFIG), lazily=EVERYTHING),
    "vllm_hidrop.cli.families": Rule(("vllm_hidrop.models.families", "vllm_hidrop.models.family", *EDGES, *CONFIG)),
    "vllm_hidrop.cli.verify": Rule(
        ("vllm_hidrop.cli", "vllm_hidrop.verify", *EDGES), lazily=("torch", "vllm_hidrop.lab.train.packed_attention")
    ),
    "vllm_hidrop.embedded": Rule((*MODELS, "torch", "vllm")),
    "vllm_hidrop.lab": Rule((*MODELS, *EDGES, "vllm_hidrop.embedded", "torch", "vllm")),
    "vllm_hidrop.lab.convert": Rule((*CONFIG, "vllm_hidrop.json_text", "vllm_hidrop.lab.atomic_write", "torch")),
    "vllm_hidrop.lab.evaluate": Rule((*EDGES, "vllm_hidrop.embedded", "vllm_hidrop.lab.validation")),
    "vllm_hidrop.lab.evaluate.tasks.synthetic": Rule(
        ("vllm_hidrop.lab.evaluate", "vllm_hidrop.lab.train.scenes", "vllm_hidrop.lab.train.questions")
    ),
    "vllm_hidrop.lab.evaluate.report": Rule(("vllm_hidrop.lab", "vllm_hidrop.embedded", "vllm_hidrop.cli", *CONFIG)),
    "vllm_hidrop.lab.calibrate": Rule(
        (*EDGES, *CONFIG, "vllm_hidrop.models", "torch"), lazily=("vllm_hidrop.lab.train",)
    ),
    "vllm_hidrop.monitoring": Rule(("vllm_hidrop.cli", *EDGES)),
    "vllm_hidrop.bench": Rule(
        EDGES, lazily=("vllm_hidrop.engine.compat", "hidrop_loadtests.pictures", "torch", "vllm")
    ),
    "vllm_hidrop.verify": Rule(
        ("vllm_hidrop.bench", "vllm_hidrop.models.families", *EDGES, *CONFIG, "torch"),
        lazily=("vllm_hidrop.cli", "vllm_hidrop.embedded", "vllm_hidrop.models.family", "vllm"),
    ),
    "vllm_hidrop.verify.tiny_models": Rule(("vllm_hidrop.bench", "vllm_hidrop.verify.tiny_parts", "torch")),
    "vllm_hidrop.verify.tiny_parts": Rule(("torch",)),
    "vllm_hidrop.verify.tiny_qwen": Rule(("vllm_hidrop.verify",)),
    # An independent second opinion: what it shares with the engine it cannot judge.
    "vllm_hidrop.verify.reference": Rule(("torch",)),
    "hidrop_server": Rule(
        (*MODELS, "vllm_hidrop.json_text", "vllm_hidrop.plugin", "vllm_hidrop.embedded", "torch", "vllm")
    ),
    "hidrop_loadtests": Rule(lazily=("vllm.benchmarks",)),
}
# The package file of `vllm_hidrop` runs before every command and in vLLM's search for plug-ins.
PACKAGE_RULE = Rule()


@dataclass(frozen=True)
class Import:
    """One imported name; lazy when importing the file does not import it."""

    target: str
    line: int
    lazy: bool


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def is_lazy_block(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imports_in(node: ast.AST, package: str, *, lazy: bool = False) -> Iterator[Import]:
    """Yield the imports under a node; `package` is what relative ones start from."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, lazy)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")
            kept = parents[: len(parents) - child.level + 1] if child.level else []
            base = ".".join([*kept, child.module] if child.module else kept)
            # In `from a import b`, b may be a module, and then it is b that the rules are about.
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, lazy)
        else:
            yield from imports_in(child, package, lazy=lazy or is_lazy_block(child))


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Name every import of a module that its rule does not allow, with its line."""
    row = max((prefix for prefix in RULES if within(module, prefix)), key=len, default=None)
    if row is None and module != "vllm_hidrop":
        return [f"{module} has no row in RULES"]
    rule = RULES[row] if row else PACKAGE_RULE
    allowed = (*rule.always, *([row] if row else []))

    def is_allowed(found: Import) -> bool:
        prefixes = (*allowed, *rule.lazily) if found.lazy else allowed
        if found.target in ("vllm_hidrop", "vllm_hidrop.__version__"):
            return any(within(prefix, "vllm_hidrop") for prefix in prefixes)
        return any(within(found.target, prefix) for prefix in prefixes)

    package = module if is_package else module.rpartition(".")[0]
    return [
        f"{module}:{found.line} imports {found.target}"
        for found in imports_in(ast.parse(source), package)
        if any(within(found.target, name) for name in RULED) and not is_allowed(found)
    ]


def modules() -> Iterator[tuple[str, Path]]:
    for package, directory in DIRECTORIES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def test_every_module_imports_only_what_its_rule_allows() -> None:
    found = dict(modules())
    assert "vllm_hidrop.plugin" in found
    broken = [
        violation
        for module, path in found.items()
        for violation in violations(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_hidrop.plan.schedule", "import torch"),
        ("vllm_hidrop.plan.schedule", "from ..methods.scoring import select_top"),
        ("vllm_hidrop.methods.scoring", "import vllm.config"),
        ("vllm_hidrop.staged.loop", "from vllm_hidrop.engine.scheduler import StagedScheduler"),
        ("vllm_hidrop.engine.scheduler", "from vllm_hidrop.runners.v1 import make_staged"),
        ("vllm_hidrop.runners.v1", "from vllm_hidrop.methods import METHODS"),
        ("vllm_hidrop.methods.fastv", "def late():\n    import vllm"),
        ("vllm_hidrop.methods.fastv", "if TYPE_CHECKING:\n    from vllm.config import VllmConfig"),
        ("vllm_hidrop.config.settings", "from vllm_hidrop import models"),
        ("vllm_hidrop.engine.scheduler", "from vllm_hidrop.methods.hidrop import HiDrop"),
        ("vllm_hidrop.engine.scheduler", "import vllm_hidrop.models.llava"),
        ("vllm_hidrop.models.llava", "from vllm_hidrop.lab.train import data"),
        ("vllm_hidrop.plugin", "import torch"),
        ("vllm_hidrop.plugin", "try:\n    from vllm import ModelRegistry\nexcept ImportError: ..."),
        ("vllm_hidrop.cli.app", "import hidrop_server.app"),
        ("vllm_hidrop", "import torch"),
        ("hidrop_server.app", "import vllm_hidrop.lab.train"),
        ("hidrop_server.app", "import server.routes"),
        ("hidrop_loadtests.run", "import vllm_hidrop"),
        ("hidrop_loadtests.run", "from vllm.benchmarks import serve"),
        ("hidrop_loadtests.run", "def late():\n    from vllm import LLM"),
        ("vllm_hidrop.somewhere", "import json"),
        ("vllm_hidrop.verify.reference.shortened", "from vllm_hidrop.methods.scoring import select_top"),
        ("vllm_hidrop.verify.reference.attention", "def late():\n    import vllm"),
    ],
)
def test_a_broken_arrow_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_hidrop.plan.plan", "from .schedule import Stage"),
        ("vllm_hidrop.methods.fastv", "from vllm_hidrop.methods.scoring import attention_score"),
        ("vllm_hidrop.engine.scheduler", "import vllm.v1\nfrom ..plan import schedule"),
        ("vllm_hidrop.models.llava", "from vllm_hidrop.staged.loop import StagedLayers"),
        ("vllm_hidrop.plugin", "def register():\n    from vllm import ModelRegistry"),
        ("vllm_hidrop.cli.app", "def serve():\n    from hidrop_server.app import run"),
        ("vllm_hidrop.cli.app", "from vllm_hidrop import __version__"),
        ("hidrop_server.app", "import vllm.entrypoints\nfrom hidrop_server.control.routes import router"),
        ("hidrop_loadtests.run", "import openai\nfrom hidrop_loadtests import report"),
        ("hidrop_loadtests.run", "def late():\n    from vllm.benchmarks import serve"),
    ],
)
def test_an_arrow_of_the_architecture_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []
