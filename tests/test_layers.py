"""The layers: a connection can be followed from accept to close by walking down, and nothing below asks what is above."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import aioecho

pytestmark = pytest.mark.once

FOLDER = Path(aioecho.__file__).parent
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text("utf-8")) for module, path in SOURCES.items()}

# From the top. A layer's modules import their own folder and what is in a lower line. Nothing imports its neighbour in a line.
LAYERS = (
    {"__main__"},
    {"cli", "testing", "compat"},
    {"load", "client", "echo", "check"},
    {"workers"},
    {"ops"},
    {"background"},
    {"choice", "several"},
    {"parts"},
    {"server"},
    {"datagrams"},
    {"blocking"},
    {"serving"},
    {"streams"},
    {"framing"},
    {"net"},
    {"runtime"},
    {"stats", "metrics", "config", "certificates"},
    {"exceptions"},
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

# What users import from: it hands on names from everywhere, and nothing imports from it.
DOOR = "__init__"

# They talk to any servers, and so know nothing of ours.
CLIENTS = {"client", "load"}
OF_SERVERS = {
    *("net.acceptor", "net.binding", "net.watch"),
    *(
        "serving",
        "datagrams",
        "blocking",
        "server",
        "choice",
        "several",
        "parts",
        "background",
        "workers",
        "ops",
        "echo",
    ),
}

# They write to the standard streams of a program.
PRINTERS = {"cli", "load.report"}

MOST_LINES = 400


def layer_of(module: str) -> str:
    """Return the name of the folder that a module is in, or its own."""
    return module.partition(".")[0]


def is_in(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def imports_of(module: str) -> Iterator[tuple[str, str | None, int]]:
    """Yield the module of aioecho, the name and the line of each import, those for type checkers included."""
    for node in ast.walk(TREES[module]):
        match node:
            case ast.Import(names=names):
                for name in names:
                    package, _, imported = name.name.partition(".")
                    if package == "aioecho":
                        yield imported or DOOR, None, node.lineno
            case ast.ImportFrom(module=source, names=names, level=0):
                package, _, imported = (source or "").partition(".")
                if package == "aioecho":
                    for name in names:
                        inner = f"{imported}.{name.name}".lstrip(".")
                        if inner in SOURCES:
                            yield inner, None, node.lineno
                        elif (imported, name.name) != ("", "__version__"):
                            yield imported or DOOR, name.name, node.lineno
            case ast.ImportFrom(level=level) if level:
                yield "a relative import", None, node.lineno


def private_names(module: str) -> Iterator[str]:
    """Yield the private names that a module defines, as functions, variables, attributes and slots."""
    for node in ast.walk(TREES[module]):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Constant(value=str(name)):
                yield name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


PRIVATE = {module: {name for name in private_names(module) if is_private(name)} for module in SOURCES}


def test_every_module_has_its_place() -> None:
    assert {layer_of(module) for module in SOURCES} - {DOOR} <= set(DEPTH)


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Not for their types either."""
    imported = {module: {source for source, _, _ in imports_of(module)} - {module} for module in SOURCES}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' < '.join(error.args[1])}")


def test_imports_go_down_only() -> None:
    wrong = [
        f"{module}:{line} imports {source}"
        for module in SOURCES
        if module != DOOR
        for source, _, line in imports_of(module)
        if layer_of(source) != layer_of(module) and DEPTH.get(layer_of(source), -1) <= DEPTH[layer_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_longer_than_a_reader_keeps_in_mind() -> None:
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in SOURCES.items()}
    wrong = [f"{module} has {lines} lines" for module, lines in lengths.items() if lines > MOST_LINES]
    assert not wrong, "\n".join(wrong)


def test_private_names_are_not_imported() -> None:
    assert [f"{m}:{line} {name}" for m in SOURCES for _, name, line in imports_of(m) if name and is_private(name)] == []


def test_no_layer_reaches_into_the_private_names_of_another() -> None:
    """By an attribute of something else than `self` or `cls` that only another layer defines."""
    defined_in: dict[str, set[str]] = {}
    for module, names in PRIVATE.items():
        defined_in.setdefault(layer_of(module), set()).update(names)
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                    continue
                case ast.Attribute(attr=name) if is_private(name):
                    owners = {layer for layer, names in defined_in.items() if name in names}
                    if owners and layer_of(module) not in owners:
                        wrong.append(f"{module}:{node.lineno} {ast.unparse(node)} of {', '.join(sorted(owners))}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("client", sorted(CLIENTS))
def test_a_client_imports_nothing_of_a_server(client: str) -> None:
    reached, waiting = set(), [module for module in SOURCES if layer_of(module) == client]
    assert waiting
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [source for source, _, _ in imports_of(module)]
    assert not {module for module in reached if is_in(module, OF_SERVERS)}


def test_only_the_command_line_prints() -> None:
    wrong = []
    for module, tree in TREES.items():
        if not is_in(module, PRINTERS):
            for node in ast.walk(tree):
                match node:
                    case ast.Call(func=ast.Name(id="print")):
                        wrong.append(f"{module}:{node.lineno} prints")
                    case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" as name):
                        wrong.append(f"{module}:{node.lineno} writes to {name}")
    assert not wrong, "\n".join(wrong)
