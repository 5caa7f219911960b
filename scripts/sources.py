"""Python packages as their sources say, read with ``ast`` and never imported: names, base classes, signatures.

So a vLLM that is not installed, or cannot be imported on this machine, can be read like one that is.
"""

import ast
import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TAGS = ("property", "cached_property", "classmethod", "staticmethod", "abstractmethod")
"""Decorators that belong to a signature."""


@dataclass(frozen=True)
class Definition:
    """What a name stands for: a module (``node`` is None), class, function, or else a variable or attribute."""

    module: str
    name: str  # within the module, with its class
    node: ast.AST | None

    @property
    def dotted(self) -> str:
        """The name with its module, where it is defined."""
        return f"{self.module}.{self.name}" if self.name else self.module


class Module:
    """One source file. Of our own (``deep``), names bound within functions count, too."""

    def __init__(self, name: str, path: Path, deep: bool) -> None:
        self.name, self.path, self.deep = name, path, deep
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)

    @cached_property
    def bindings(self) -> dict[str, ast.AST | str]:
        """By name, its definition, or the dotted name that it is imported from; of two, the first."""
        found: dict[str, ast.AST | str] = {}
        for node in ast.walk(self.tree) if self.deep else _top_level(self.tree.body):
            for name, bound in self._bound_by(node):
                found.setdefault(name, bound)
        return found

    def _bound_by(self, node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
        if isinstance(node, ast.ImportFrom):
            base = self._base_of(node)
            yield from ((alias.asname or alias.name, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            yield node.name, node
        else:
            yield from ((name, node) for name in _assigned(node))

    @cached_property
    def stars(self) -> tuple[str, ...]:
        """The modules of which all names are imported."""
        imports = (node for node in _top_level(self.tree.body) if isinstance(node, ast.ImportFrom))
        return tuple(self._base_of(node) for node in imports if node.names[0].name == "*")

    def _base_of(self, node: ast.ImportFrom) -> str:
        """The module that a ``from ... import`` names."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        package = parts if self.path.name == "__init__.py" else parts[:-1]
        return ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])

    def source_of(self, node: ast.AST) -> str:
        """The lines of a definition, without its indentation."""
        lines = self.text.splitlines()[node.lineno - 1 : node.end_lineno]  # type: ignore[attr-defined]
        return textwrap.dedent("\n".join(line.rstrip() for line in lines))


class Sources:
    """Packages by name, each in a folder; ``deep`` names those whose functions are read for imports and classes."""

    def __init__(self, folders: Mapping[str, Path], deep: Iterable[str] = ()) -> None:
        self.folders, self.deep = folders, frozenset(deep)
        self.module = cache(self._module)
        self.find = cache(self._find)
        self.line_of_descent = cache(self._line_of_descent)

    def _module(self, name: str) -> Module | None:
        package, *rest = name.split(".")
        if package not in self.folders:
            return None
        path = self.folders[package].joinpath(*rest)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return Module(name, file, package in self.deep)
        return None

    def modules(self, package: str) -> Iterator[Module]:
        """All modules of a package, in order."""
        for path in sorted(self.folders[package].rglob("*.py")):
            parts = [package, *path.relative_to(self.folders[package]).with_suffix("").parts]
            module = self.module(".".join(part for part in parts if part != "__init__"))
            assert module is not None
            yield module

    def _find(self, dotted: str) -> Definition | None:
        """What a dotted name stands for, imports followed; None where its package has no such name."""
        parts = dotted.split(".")
        known = list(takewhile(lambda end: self.module(".".join(parts[:end])), range(1, len(parts) + 1)))
        if not known:
            return None
        module, rest = ".".join(parts[: known[-1]]), parts[known[-1] :]
        if not rest:
            return Definition(module, "", None)
        found = self.lookup(module, rest[0])
        for name in rest[1:]:
            found = self.member(found, name) if found is not None else None
        return found

    def lookup(self, module: str, name: str) -> Definition | None:
        """What a name stands for within a module, its submodules not counted."""
        source = self.module(module)
        bound = source.bindings.get(name) if source is not None else None
        if bound is None and source is not None:
            return next(filter(None, (self.find(f"{star}.{name}") for star in source.stars)), None)
        if bound is None or bound == f"{module}.{name}":
            return None
        if isinstance(bound, str) and bound.split(".")[0] not in self.folders:
            return Definition(module, name, ast.Name(bound))  # another package's
        return self.find(bound) if isinstance(bound, str) else Definition(module, name, bound)

    def member(self, found: Definition, name: str) -> Definition | None:
        """A name of a module, of a class or its bases, or of an annotated variable's class; None where it has none."""
        if found.node is None:
            return self.find(f"{found.module}.{name}")
        of_class = self.class_of(found)
        for cls in () if of_class is None else self.line_of_descent(of_class):
            if name in members(cls.node):
                return Definition(cls.module, f"{cls.name}.{name}", members(cls.node)[name])
        return None

    def class_of(self, found: Definition) -> Definition | None:
        """The class itself, or the one that a variable is annotated with; None where no class is known."""
        if isinstance(found.node, ast.AnnAssign):
            annotated = self.lookup(found.module, ast.unparse(found.node.annotation).strip("'"))
            return self.class_of(annotated) if annotated is not None else None
        return found if isinstance(found.node, ast.ClassDef) else None

    def _line_of_descent(self, found: Definition) -> tuple[Definition, ...]:
        """A class and its base classes in known packages, nearest first; a shared base comes after all that have it."""
        assert isinstance(found.node, ast.ClassDef)
        line = [found]
        for base in self.bases(found):
            line += self.line_of_descent(base)
        last = {cls: place for place, cls in enumerate(line)}
        return tuple(cls for place, cls in enumerate(line) if last[cls] == place)

    def bases(self, found: Definition) -> Iterator[Definition]:
        """A class's base classes, as far as known packages define them."""
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            head, *rest = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).split(".")
            cls = self.lookup(found.module, head)
            for name in rest:
                cls = self.member(cls, name) if cls is not None else None
            if cls is not None and isinstance(cls.node, ast.ClassDef):
                yield cls

    def constructor(self, cls: Definition) -> str:
        """The arguments that make an instance: those of ``__init__``, or a data class's fields, bases' first."""
        init = self.member(cls, "__init__")
        if init is not None and isinstance(init.node, FUNCTIONS):
            return f"({ast.unparse(init.node.args)})"
        annotated = [
            ast.unparse(node)
            for base in reversed(self.line_of_descent(cls))
            if isinstance(base.node, ast.ClassDef)
            for node in base.node.body
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
        ]
        return f"({', '.join(annotated)})"

    def digest(self, found: Definition) -> str:
        """Eight digits that change with a definition's source, comments included, but not with its place."""
        module = self.module(found.module)
        assert module is not None
        assert found.node is not None
        return hashlib.sha256(module.source_of(found.node).encode()).hexdigest()[:8]


def describe(found: Definition) -> str:
    """The signature of a function, else the kind."""
    if found.node is None:
        return "module"
    if isinstance(found.node, FUNCTIONS):
        return signature(found.node)
    if isinstance(found.node, ast.ClassDef):
        return "class"
    return "attribute" if "." in found.name else "variable"


def signature(node: Function) -> str:
    """The decorators that matter, ``async``, arguments and result of a function."""
    named = [ast.unparse(each).rpartition(".")[2] for each in node.decorator_list]
    tags = [f"@{name} " for name in named if name in TAGS]
    is_async = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{''.join(tags)}{is_async}({ast.unparse(node.args)}){returns}"


@cache
def members(cls: ast.AST | None) -> dict[str, ast.AST]:
    """A class's own methods and attributes by name, those that its methods set on ``self`` included."""
    assert isinstance(cls, ast.ClassDef)
    found: dict[str, ast.AST] = {}
    for node in _top_level(cls.body):
        if isinstance(node, FUNCTIONS) and not _is_overload(node):
            found.setdefault(node.name, node)
        for name in _assigned(node):
            found.setdefault(name, node)
    for inner in ast.walk(cls):
        for target in _targets(inner):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                found.setdefault(target.attr, inner)
    return found


def _is_overload(node: Function) -> bool:
    return any(ast.unparse(each).rpartition(".")[2] == "overload" for each in node.decorator_list)


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those within their branches, but not within functions and classes."""
    for node in body:
        yield node
        if not isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            for name in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, name, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _top_level(handler.body)


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else (target,)


def _assigned(node: ast.AST) -> Iterator[str]:
    """The plain names that a statement assigns."""
    yield from (target.id for target in _targets(node) if isinstance(target, ast.Name))
