"""Imports go down, floor by floor, and heavy libraries stay in the rooms that need them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.arch.sources import GENERATED, ROOT, Module, is_in, modules, written
from tests.daemon import clean_environment

#: The rooms of ``kvd``, lowest floor first. A new room is entered here, on the lowest floor where it can stand.
FLOORS = (
    {
        "kvd.wire",
        "kvd.types",
        "kvd.config",
        "kvd.values",
        "kvd.metrics",
        "kvd.lock",
        "kvd.failpoints",
        "kvd.names",
        "kvd.workers",
    },
    {"kvd.ledger", "kvd.memory", "kvd.spill"},
    {"kvd.recovery", "kvd.store"},
    {
        "kvd.authority",
        "kvd.calls",
        "kvd.control",
        "kvd.convert",
        "kvd.desk",
        "kvd.http",
        "kvd.lifeline",
        "kvd.peers",
        "kvd.report",
        "kvd.service",
        "kvd.recorder",
        "kvd.session",
        "kvd.tiering",
        "kvd.transport",
        "kvd.upkeep",
    },
    {"kvd.__main__", "kvd.cli", "kvd.preflight", "kvd.replay", "kvd.server", "kvd.status", "kvd.storage"},
)

#: Rooms that see less than their floor would let them: of ``kvd`` they import these and themselves.
SECLUDED = {
    "kvd.wire": set(),
    "kvd.lock": set(),
    "kvd.types": {"kvd.wire"},
    "kvd.config": {"kvd.types", "kvd.values", "kvd.wire"},
    "kvd.values": {"kvd.types", "kvd.wire"},
    "kvd.metrics": {"kvd.types", "kvd.wire"},
    # Books and bytes never meet.
    "kvd.ledger": {"kvd.types", "kvd.wire"},
    "kvd.memory": {"kvd.types", "kvd.wire", "kvd.failpoints", "kvd.names"},
    "kvd.spill": {"kvd.types", "kvd.wire", "kvd.failpoints", "kvd.names", "kvd.lock"},
    "kvd.failpoints": set(),
    "kvd.names": {"kvd.types", "kvd.wire"},
    # Bytes move without the books: what the data plane must ask it asks through its Authority.
    "kvd.transport": {"kvd.types", "kvd.wire"},
}

#: Nothing in the books waits, locks, or touches the world.
PURE = {"__future__", "array", "collections", "dataclasses", "enum", "heapq", "itertools", "time", "typing"}

#: Who may load what takes seconds to load, or is not installed everywhere.
TENSORS = {"kvd_client.copier_torch", "kvd_client.copier_cupy", "kvd_client.cuda", "kvd_client.dma"}
TENSORS |= {"kvd_client.bench.copying", "kvd_client.bench.engine_process"}  # loaded where they are installed
HEAVY = {
    "torch": TENSORS,
    "numpy": TENSORS | {"kvd_client.memory", "kvd.spill.codec"},  # comes with torch, or with kvd[compress]
    "zstandard": {"kvd.spill.codec", "kvd.replay.trace"},
    "cupy": {"kvd_client.cuda"},
    "vllm": {"kvd_client.adapters.vllm", "kvd_client.bench.engine_process"},
}


def room_of(name: str) -> str:
    """The room of a module of ``kvd``: ``kvd.ledger`` for ``kvd.ledger.index``."""
    return ".".join(name.split(".")[:2])


def floor_of(name: str) -> int:
    """The number of a module's floor."""
    found = [number for number, rooms in enumerate(FLOORS) if room_of(name) in rooms]
    assert len(found) == 1, f"{room_of(name)} stands on no floor, or on two: say in FLOORS where it belongs"
    return found[0]


def of(module: Module, package: str) -> list[tuple[str, int]]:
    """What a module imports of ``package``: (module, line)."""
    return [(found.target, found.line) for found in module.imports() if is_in(found.target, package)]


def library(target: str) -> str:
    """The top-level package that an import names."""
    return target.split(".")[0]


def test_every_room_stands_on_one_floor_and_every_room_exists() -> None:
    rooms = {room_of(module.name) for module in modules("kvd") if module.name != "kvd"}
    for room in rooms:
        floor_of(room)
    assert rooms == set().union(*FLOORS)


def test_imports_go_down_only() -> None:
    wrong = [
        f"{module.where}:{line}: floor {floor_of(module.name)} imports {target} of floor {floor_of(target)}"
        for module in modules("kvd")
        if module.name != "kvd"
        for target, line in of(module, "kvd")
        if target != "kvd" and floor_of(target) > floor_of(module.name)
    ]
    assert wrong == []


@pytest.mark.parametrize("room", sorted(SECLUDED))
def test_secluded_rooms_see_only_what_they_must(room: str) -> None:
    allowed = SECLUDED[room] | {room}
    wrong = [
        f"{module.where}:{line}: {target}"
        for module in modules("kvd")
        if is_in(module.name, room)
        for target, line in of(module, "kvd")
        if not any(is_in(target, other) for other in allowed)
    ]
    assert wrong == []


def test_the_lock_needs_nothing_but_python() -> None:
    (lock,) = (module for module in modules("kvd") if module.name == "kvd.lock")
    assert {library(found.target) for found in lock.imports()} <= sys.stdlib_module_names


def test_the_package_itself_imports_nothing() -> None:
    (package,) = (module for module in modules("kvd") if module.name == "kvd")
    assert package.imports() == []


def test_the_books_do_no_input_or_output_and_hold_no_locks() -> None:
    wrong = [
        f"{module.where}:{found.line}: {found.target}"
        for module in modules("kvd")
        if is_in(module.name, "kvd.ledger") or module.name == "kvd.store"
        for found in module.imports()
        if library(found.target) not in PURE | {"kvd"}
    ]
    assert wrong == []


def test_the_client_imports_of_the_daemon_only_what_goes_over_the_wire() -> None:
    wrong = [
        f"{module.where}:{line}: {target}"
        for module in modules("kvd_client")
        for target, line in of(module, "kvd")
        if not is_in(target, "kvd.wire")
    ]
    assert wrong == []


def test_the_daemon_does_not_know_its_clients_and_the_product_not_its_demo() -> None:
    wrong = [
        f"{module.where}:{found.line}: {found.target}"
        for package, strangers in (("kvd", {"kvd_client", "deploy", "tests"}), ("kvd_client", {"deploy", "tests"}))
        for module in modules(package)
        for found in module.imports()
        if library(found.target) in strangers
        # `kvd bench` measures a daemon from outside, as a client, and is loaded for that command only.
        and (module.name, found.target) != ("kvd.cli", "kvd_client.bench.run")
    ]
    assert wrong == []


def test_nothing_but_the_adapters_knows_an_engine() -> None:
    wrong = [
        f"{module.where}:{line}: {target}"
        for module in modules("kvd_client")
        if not is_in(module.name, "kvd_client.adapters")
        for target, line in of(module, "kvd_client.adapters")
    ]
    assert wrong == []


@pytest.mark.parametrize("heavy", sorted(HEAVY))
def test_heavy_libraries_stay_in_their_rooms(heavy: str) -> None:
    wrong = [
        f"{module.where}:{found.line}: {found.target}"
        for package in ("kvd", "kvd_client")
        for module in modules(package)
        if not any(is_in(module.name, room) for room in HEAVY[heavy])
        for found in module.imports()
        # A name that only the type checker reads loads nothing; in the daemon not even that.
        if library(found.target) == heavy and (package == "kvd" or not found.typing_only)
    ]
    assert wrong == []


def test_no_module_needs_itself_to_be_imported() -> None:
    graph = {
        module.name: {
            found.target
            for found in module.imports()
            if found.top_level and not found.typing_only and found.target != module.name
        }
        for package in ("kvd", "kvd_client")
        for module in modules(package)
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            visit(target, [*path, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def test_every_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {_distribution(requirement) for requirement in project["dependencies"]}
    known = packages_distributions()
    wrong = []
    for module in written("kvd", "kvd_client"):
        for found in module.imports():
            name = library(found.target)
            if name in sys.stdlib_module_names | {"kvd", "kvd_client"} | set(HEAVY) or found.typing_only:
                continue
            if not declared & {_distribution(other) for other in known.get(name, [])}:
                wrong.append(f"{module.where}:{found.line}: {found.target} comes with none of {sorted(declared)}")
    assert wrong == []


@pytest.mark.parametrize(
    ("imported", "strangers"),
    [
        ("kvd.cli, kvd.server", [*HEAVY, "kvd_client", "pandas", "scipy"]),
        ("kvd_client", [*HEAVY, "uvloop", "prometheus_client", "h11"]),
    ],
)
def test_an_import_brings_nothing_heavy(imported: str, strangers: list[str], tmp_path: Path) -> None:
    script = f"import json, sys\nimport {imported}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout)
    assert [name for name in loaded if library(name) in strangers] == []
    if imported == "kvd_client":
        assert [name for name in loaded if is_in(name, "kvd") and not is_in(name, "kvd.wire") and name != "kvd"] == []


def test_the_generated_code_stands_where_the_tests_look_for_it() -> None:
    assert [module.name for module in modules("kvd") if module.generated] == [
        GENERATED,
        f"{GENERATED}.kvd_pb2",
        f"{GENERATED}.kvd_pb2_grpc",
    ]


def _distribution(requirement: str) -> str:
    """The normal form of the name that a requirement begins with."""
    name = re.split(r"[ <>=!~\[;]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()
