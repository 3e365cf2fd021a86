"""The rooms of the package: each imports from those above it alone, and no files in a circle."""

import ast
import graphlib
import importlib
import inspect
from pathlib import Path

import pytest

import fedjax_lite as fl

PACKAGE = Path(fl.__file__).parent
# From the top: a room imports only from those before it, and from itself.
ROOMS = [
    "base",
    "xla",
    "data",
    "samplers",
    "engine",
    "models",
    "updates",
    "privacy",
    "algorithms",
    "evaluation",
    "runs",
    "experiments",
    "cli",
]
HELPERS = {"_extras", "_files", "_repr", "_validate"}  # Of every room; they import from none.


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IN_ROOMS = {
    name: path for name, path in MODULES.items() if "." in name and name != "fedjax_lite.__main__"
}


def imports(path):
    """The modules of the package that a file imports anywhere in it, doctests aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "fedjax_lite")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedjax_lite"):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            yield from submodules or {node.module}


def room_of(module):
    return module.split(".")[1]


def test_all_files_are_in_rooms():
    assert {room_of(name) for name in IN_ROOMS} == {*ROOMS, *HELPERS}
    assert len(IN_ROOMS) > 100


def test_a_room_imports_only_from_rooms_above_it():
    upwards = []
    for name, path in IN_ROOMS.items():
        room = room_of(name)
        above = {*HELPERS, *([] if room in HELPERS else ROOMS[: ROOMS.index(room) + 1])}
        imported = set(imports(path))
        if room == "cli":  # A user of the whole.
            imported.discard("fedjax_lite")
        upwards += [(name, other) for other in imported if room_of(f"{other}.") not in above]
    assert not upwards


def test_no_files_import_each_other_in_a_circle():
    graph = {name: set(imports(path)) - {name} for name, path in IN_ROOMS.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # Raises if there is one.
    assert set(IN_ROOMS) <= set(order)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("base", "cli")])
def test_a_room_says_what_it_is_for_and_exports_its_names(room):
    module = importlib.import_module(f"fedjax_lite.{room}")
    assert inspect.getdoc(module)
    names = set(getattr(module, "__all__", ()))
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names >= public
