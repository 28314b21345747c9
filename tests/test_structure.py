"""Imports run one way: no file imports from a room above its own, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moetrain

PACKAGE = Path(moetrain.__file__).parent
# From the top down; a room may import from its own floor's files of the same room, and from every floor below.
FLOORS = (
    ("train",),
    ("training_run",),
    ("paper",),
    ("calibration", "training_loop"),
    ("trainer", "replay"),
    ("integrations",),
    ("run_summary",),
    ("run_saving", "run_state", "run_stream"),
    ("report", "monitoring"),
    ("loggers",),
    ("probes", "training"),
    ("routing", "checkpoint"),
    ("distributed", "optim"),
    ("models", "data"),
    ("metrics",),
    ("config", "atomic_io"),
    ("grokking", "expression", "device_transfer", "dtensor", "model_input", "fault_injection", "version", "_moved"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path):
    """The modules of the package that a file imports, inside of functions as well."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            module = base if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules():
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


def edges():
    known = modules()
    for name, path in known.items():
        for target in imports(path):
            if not target.startswith("moetrain."):
                continue
            target = target.removeprefix("moetrain.")
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield name, target


def test_every_room_has_a_floor_and_a_sentence():
    rooms = {name.partition(".")[0] for name in modules()}
    assert rooms == FLOOR.keys()
    for room in rooms:
        path = PACKAGE / room / "__init__.py"
        text = (path if path.is_file() else PACKAGE / f"{room}.py").read_text()
        assert ast.get_docstring(ast.parse(text)), room


def test_no_file_imports_from_its_own_floor_or_above():
    wrong = []
    for name, target in edges():
        room, other = name.partition(".")[0], target.partition(".")[0]
        if room != other and FLOOR[room] >= FLOOR[other]:
            wrong.append((name, target))
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    graph = {}
    for name, target in edges():
        if not name.startswith(f"{target}."):  # a package's __init__ hands on what its files define
            graph.setdefault(name, set()).add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", ["grokking"])
def test_the_science_imports_nothing_of_the_project(name):
    assert {target.partition(".")[0] for source, target in edges() if source.partition(".")[0] == name} <= {name}
