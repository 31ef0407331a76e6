"""The program itself, called ``__main__``: how another interpreter finds and imports it."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from types import CodeType

__all__ = ["find_main", "import_main"]

# multiprocessing's name for it: what stands under ``if __name__ == "__main__"`` is left out.
NAME = "__mp_main__"


def find_main() -> tuple[str, str]:
    """Return how another interpreter finds the program: ("module", name), ("file", path) or ("archive", path).

    Raises:
        TypeError: it was not loaded from any of these, as with ``python -c``.
    """
    program = sys.modules["__main__"]
    name = getattr(getattr(program, "__spec__", None), "name", None)
    # A folder's and an archive's program is called so too, and cannot be found by that name.
    if name is not None and name != "__main__":
        return "module", name
    file = getattr(program, "__file__", None)
    if file is not None:
        if os.path.exists(file):
            return "file", os.path.abspath(file)
        archive = os.path.abspath(os.path.dirname(file))
        if os.path.exists(archive) and PathFinder.find_spec("__main__", [archive]) is not None:
            return "archive", archive
    raise TypeError(
        "worker processes import the handler, and its program has no file: put the handler's class into a module"
    )


def import_main(kind: str, name: str) -> None:
    """Import the program that :func:`find_main` has found, as ``__main__`` and ``__mp_main__``."""
    # Not by runpy, which leaves `__spec__` None: from 3.15 on, tracebacks and asyncio's debug mode warn of that.
    spec, code = _load_file(name) if kind == "file" else _load_module(kind, name)
    module = importlib.util.module_from_spec(spec)
    module.__name__ = NAME
    if kind == "file":
        # multiprocessing in a handler would look for a module of that name. Without a name it takes the file.
        spec.name = None  # type: ignore[assignment]
    sys.modules["__main__"] = sys.modules[NAME] = module
    exec(code, module.__dict__)


def _load_file(path: str) -> tuple[ModuleSpec, CodeType]:
    if path.endswith(".pyc"):
        sourceless = SourcelessFileLoader(NAME, path)
        code, loader = sourceless.get_code(NAME), sourceless
    else:
        source = SourceFileLoader(NAME, path)
        # Not get_code(): that writes a cache beside the program, which Python does not do for one that it runs.
        code, loader = source.source_to_code(source.get_data(path), path), source  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    assert code is not None
    return spec, code


def _load_module(kind: str, name: str) -> tuple[ModuleSpec, CodeType]:
    spec = PathFinder.find_spec("__main__", [name]) if kind == "archive" else importlib.util.find_spec(name)
    get_code = getattr(spec and spec.loader, "get_code", None)
    code = get_code(spec.name) if spec is not None and get_code is not None else None
    if spec is None or code is None:
        raise ImportError(f"the program is not found again in {name!r}", name=name)
    return spec, code
