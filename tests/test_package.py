"""The package as a whole: what it exports, what it imports, what it ships."""

import ast
import importlib.util
import pkgutil
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path

import pytest
from programs import ROOT

import aioecho
from aioecho.datagrams import task

FOLDER = Path(aioecho.__file__).parent
# Not the folders that hand nothing on.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(FOLDER)], "aioecho.")
    if not module.ispkg or hasattr(importlib.import_module(module.name), "__all__")
)


# Imports


def test_importing_aioecho_imports_neither_click_nor_any_extra() -> None:
    required = {"uvloop"}
    unwanted = set()
    for requirement in metadata.requires("aioecho") or [] if _is_installed() else []:
        name = requirement.partition(";")[0].partition("[")[0].strip("<>=!~ .0123456789").lower().replace("-", "_")
        unwanted.add(name)
    unwanted |= {"click", "jinja2", "matplotlib", "numpy", "prometheus_client", "psutil", "rich"}
    unwanted -= required | {"aioecho"}
    program = "import sys, aioecho; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    imported = set(done.stdout.split())
    assert "aioecho" in imported
    assert not imported & unwanted


def _is_installed() -> bool:
    try:
        metadata.distribution("aioecho")
    except metadata.PackageNotFoundError:
        return False
    return True


def test_importing_aioecho_starts_no_thread_and_touches_no_signal() -> None:
    program = (
        "import signal, threading; before = [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "import aioecho, aioecho.cli\n"
        "assert threading.active_count() == 1\n"
        "assert [signal.getsignal(n) for n in signal.valid_signals()] == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_an_interpreter_without_counts_of_references_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "getrefcount")
    spec = importlib.util.spec_from_file_location("imported_again", task.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError) as raised:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(raised.value) == "aioecho runs on CPython alone: this Python, cpython, has no sys.getrefcount()"


# Exports


def test_what_users_get_is_this() -> None:
    assert aioecho.__all__ == [
        "TLS",
        "AioechoError",
        "BackgroundServer",
        "Backoff",
        "BaseRequestHandler",
        "BaseServer",
        "ByteCounts",
        "CertificateError",
        "Connection",
        "ConnectionClosed",
        "ConnectionTimeout",
        "Connections",
        "DatagramBatchHandler",
        "DatagramRequestHandler",
        "DatagramServer",
        "DatagramSessionHandler",
        "DatagramStats",
        "DrainReport",
        "EndpointError",
        "FrameTooLong",
        "FramingError",
        "Limits",
        "LineTooLong",
        "LiveConnection",
        "ProxyHeader",
        "ProxyProtocol",
        "ProxyTLS",
        "Stats",
        "StreamReader",
        "StreamRequestHandler",
        "StreamWriter",
        "TCPServer",
        "Timeouts",
        "UDPServer",
        "UnixDatagramServer",
        "UnixStreamServer",
        "__version__",
        "connect",
        "run",
        "run_in_thread",
        "serve",
    ]


def test_users_get_nothing_else() -> None:
    public = {
        name
        for name, value in vars(aioecho).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(aioecho.__all__) - {"__version__"}


def test_the_version_is_the_distributions() -> None:
    if not _is_installed():
        pytest.skip("aioecho is run from its sources")
    assert metadata.version("aioecho") == aioecho.__version__


@pytest.mark.parametrize("name", ["aioecho", *(name for name in MODULES if name != "aioecho.__main__")])
def test_a_module_says_what_it_is_and_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert len(set(module.__all__)) == len(module.__all__)
    for each in module.__all__:
        assert hasattr(module, each), f"{name}.__all__ has {each}, which there is not"


def undocumented(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Yield what is defined in a module or class under a public name, in a private class too, and has no docstring."""
    for found in node.body:
        if isinstance(found, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in found.decorator_list}
            if not (found.name.startswith("_") or decorators & {"overload", "setter"} or ast.get_docstring(found)):
                yield f"{prefix}{found.name}"
            if isinstance(found, ast.ClassDef):
                yield from undocumented(found, f"{prefix}{found.name}.")


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_public_object_is_documented(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text("utf-8")))) == []


# What ships


@pytest.mark.once
def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("aioecho").joinpath("py.typed").is_file()


@pytest.mark.once
def test_the_newest_dated_section_of_the_change_log_is_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    found = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert found[0] == ("Unreleased", "")
    assert found[1][0] == aioecho.__version__
    assert found[1][1]


@pytest.fixture
def make_page(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], str]:
    """What makes the package index's page; hatchling, which calls it, need not be here."""
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin", "hatchling.metadata.plugin.interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["hatchling.metadata.plugin.interface"].MetadataHookInterface = object  # type: ignore[attr-defined]
    found: Callable[[str, str | None], str] = runpy.run_path(str(ROOT / "docs" / "pypi.py"))["make_page"]
    return found


@pytest.mark.once
def test_the_package_index_gets_no_link_that_leads_nowhere(make_page: Callable[[str, str | None], str]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"\]\((?!\w+:)([^)]+)\)", readme)
    assert len(targets) > 20
    page = make_page(readme, None)
    assert set(re.findall(r"\]\(([^)]+)\)", page)) == set(re.findall(r"\]\((\w+:[^)]+)\)", readme))
    assert "![" not in page
    assert "pip install aioecho" in page
    assert "pip install ." not in page
    assert "<!--" not in page
    page = make_page(readme, "https://code.example/aioecho")
    assert "](https://code.example/aioecho/blob/HEAD/docs/pages/start.md)" in page
    assert "](https://code.example/aioecho/raw/HEAD/benchmarks/results/full/brief.svg)" in page
    assert not re.search(r"\]\((?!\w+:)", page)
    for target in targets:
        assert (ROOT / target.partition("#")[0]).exists(), target
