"""The product's source as the tests of its structure read it: modules, what they import, nothing executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent

#: Written by a generator, not by us: where it stands counts, how it looks does not.
GENERATED = "kvd.wire.pb"


class Import(NamedTuple):
    """One import, as far as it names a module. ``typing_only``: it stands under ``if TYPE_CHECKING``."""

    target: str
    line: int
    typing_only: bool
    top_level: bool


@dataclass(frozen=True)
class Module:
    """One source file. ``name`` is dotted; a package's ``__init__.py`` has the name of the package."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def where(self) -> str:
        """The file, as people name it."""
        return str(self.path.relative_to(ROOT))

    @property
    def generated(self) -> bool:
        """Whether a generator wrote it."""
        return is_in(self.name, GENERATED)

    def imports(self) -> list[Import]:
        """What it imports, wherever in the file that happens."""
        return list(_imports(self.tree, self))


def is_in(name: str, package: str) -> bool:
    """Whether the dotted ``name`` is ``package`` or lies in it."""
    return name == package or name.startswith(package + ".")


@cache
def modules(package: str) -> tuple[Module, ...]:
    """Every module of a package of the product, its sub-packages included."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        text = path.read_text()
        found.append(Module(".".join(parts), path, text, ast.parse(text, str(path))))
    assert found, f"no source found in {package}"
    return tuple(found)


def written(*packages: str) -> list[Module]:
    """The modules of ``packages`` that people wrote."""
    return [module for package in packages for module in modules(package) if not module.generated]


@cache
def _names() -> frozenset[str]:
    return frozenset(module.name for package in ("kvd", "kvd_client") for module in modules(package))


def _imports(node: ast.AST, module: Module, *, typing_only: bool = False, top_level: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, typing_only, top_level)
        elif isinstance(child, ast.ImportFrom):
            for target in _targets(child, module):
                yield Import(target, child.lineno, typing_only, top_level)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            body = ast.Module(child.body, [])
            yield from _imports(body, module, typing_only=True, top_level=top_level)
            otherwise = ast.Module(child.orelse, [])
            yield from _imports(otherwise, module, typing_only=typing_only, top_level=top_level)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, module, typing_only=typing_only, top_level=top_level and not inside)


def _targets(statement: ast.ImportFrom, module: Module) -> Iterator[str]:
    base = statement.module or ""
    if statement.level:
        package = module.name.split(".")
        if module.path.name != "__init__.py":
            package.pop()
        package = package[: len(package) - (statement.level - 1)]
        base = ".".join([*package, *([base] if base else [])])
    for alias in statement.names:
        # "from kvd import config" names a module, "from kvd.config import load" does not.
        whole = f"{base}.{alias.name}"
        yield whole if whole in _names() else base
