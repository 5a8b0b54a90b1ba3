"""What every file of the product keeps to, and what the documents may rely on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.arch.sources import ROOT, Module, written

MAX_LINES = 450
PRODUCT = ("kvd", "kvd_client", "deploy")

#: Everything that is handed to people, besides the source.
DOCUMENTS = ("README.md", "CHANGELOG.md", "Makefile", "Dockerfile", "pyproject.toml", "docs", "deploy", "proto", ".ci")

#: Documents that describe the house as it is now. Decisions and changes speak of the day they were written.
CURRENT = ("README.md", "docs")


def texts(names: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Every text file of ``names`` (files or directories of the repository) that exists, with what it says."""
    for name in names:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                try:
                    yield file, file.read_text()
                except UnicodeDecodeError:
                    continue  # a picture


def test_no_file_is_long() -> None:
    sizes = {module.where: module.text.count("\n") for module in written(*PRODUCT)}
    assert {where: lines for where, lines in sizes.items() if lines > MAX_LINES} == {}


def test_everything_public_says_what_it_is() -> None:
    assert [line for module in written(*PRODUCT) for line in _undocumented(module)] == []


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert _places(marks, PRODUCT + DOCUMENTS) == []


def test_no_path_of_one_machine_is_told_to_others() -> None:
    # The home of the engine's image is everybody's.
    marks = re.compile(r"(?<![\w.~-])/(?!root/\.cache/huggingface)(work|root|tmp/b)(/|\b)")
    assert marks.search("cd /work/main") and marks.search("in /root/.cache") and not marks.search("docs/work/root/x")
    assert _places(marks, PRODUCT + DOCUMENTS) == []


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for file, text in texts(DOCUMENTS):
        if file.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target or target.startswith(("#", "mailto:")):
                continue
            if not (file.parent / target.split("#")[0]).exists():
                wrong.append(f"{file.relative_to(ROOT)}: {target}")
    assert wrong == []


def test_files_that_the_documents_name_exist() -> None:
    wrong = []
    for file, text in texts(CURRENT):
        if file.suffix != ".md" or "adr" in file.parts:
            continue
        for name in re.findall(r"`((?:kvd|kvd_client|proto|deploy|docs|tests)/[\w./-]+)`", text):
            if not (ROOT / name).exists():
                wrong.append(f"{file.relative_to(ROOT)}: {name}")
    assert wrong == []


def _places(marks: re.Pattern[str], names: tuple[str, ...]) -> list[str]:
    return sorted(
        {
            f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
            for file, text in texts(names)
            for number, line in enumerate(text.splitlines(), 1)
            if marks.search(line)
        }
    )


def _undocumented(module: Module) -> Iterator[str]:
    # An empty __init__.py only makes a directory a package.
    if module.text.strip() and ast.get_docstring(module.tree) is None:
        yield f"{module.where}: the module"
    yield from _undocumented_in(module.tree, module, "")


def _undocumented_in(node: ast.AST, module: Module, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None and not _refines(child):
            yield f"{module.where}:{child.lineno}: {prefix}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _undocumented_in(child, module, f"{prefix}{child.name}.")


def _refines(child: ast.AST) -> bool:
    """Whether it is one signature of an overloaded function, or a property's setter: documented elsewhere."""
    decorators = [ast.unparse(decorator) for decorator in getattr(child, "decorator_list", [])]
    return any(name.endswith(("overload", ".setter")) for name in decorators)
