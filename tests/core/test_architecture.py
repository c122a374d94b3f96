"""The rooms of the package and the one direction in which they import each other: docs/concepts/architecture.md."""

import ast
import functools
from pathlib import Path

import pytest

from helpers.paths import ROOT

PACKAGE = ROOT / "src" / "limbeck"
# a room imports from rooms below it only; rooms of one row do not know each other
FLOORS = [
    ["cli"],
    ["study"],
    ["training"],
    ["report"],
    ["evaluation", "testing"],
    ["models"],
    ["mixers"],
    ["ops", "data"],
    ["core"],
]
HEIGHT = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items() if name != "__init__"}


def imports(path: Path, nested: bool) -> list[tuple[str, int]]:
    """The package's own modules that a file imports, with the line; those inside functions too, if `nested`."""
    return [(name, line) for name, line, inside in read_imports(path) if nested or not inside]


@functools.cache
def read_imports(path: Path) -> list[tuple[str, int, bool]]:
    """Modules, lines, and whether they are inside a function."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue  # for the type checker: never imported
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "limbeck":
                base = (child.module or "").removeprefix("limbeck").lstrip(".")
                for alias in child.names:
                    longer = f"{base}.{alias.name}".lstrip(".")
                    found.append((longer if longer in MODULES else base, child.lineno, inside))
            elif isinstance(child, ast.Import):
                found.extend((a.name[8:], child.lineno, inside) for a in child.names if a.name.startswith("limbeck."))
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def test_the_root_holds_the_rooms_and_nothing_else():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert names == {*HEIGHT, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("module", MODULES)
def test_no_room_imports_from_above(module):
    room = module.split(".")[0]
    if room not in HEIGHT:
        return  # __main__ stands above all rooms
    for target, line in imports(MODULES[module], nested=True):
        other = target.split(".")[0]
        if other != room:
            assert target, f"{MODULES[module]}:{line} imports the face of the package"
            assert HEIGHT[other] < HEIGHT[room], f"{MODULES[module]}:{line}: {room} imports from {other}"


def test_no_circle_of_modules():
    arrows = {module: {name for name, _ in imports(path, nested=False)} for module, path in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for target in sorted(arrows.get(module, ())):
            if target != module and not module.startswith(
                f"{target}."
            ):  # a package's face is loaded before its modules
                walk(target, (*way, module))
        done.add(module)

    for module in MODULES:
        walk(module, ())


def test_imports_inside_functions_have_their_reason_beside_them():
    """Start-up time or an optional dependency, said at the line or above it.

    The command line is left out: each of its verbs imports what it needs when it runs, so that `--help` is quick.
    """
    bare = []
    for module, path in MODULES.items():
        if module.split(".")[0] == "cli":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        top = {line for _, line in imports(path, nested=False)}
        for _, line in imports(path, nested=True):
            said = "#" in lines[line - 1] or lines[line - 2].lstrip().startswith("#")
            if line not in top and not said:
                bare.append(f"{module}:{line}")
    assert not bare
