"""What the tests of several modules do alike."""

import importlib.util

import pytest

__all__ = ["skip_without"]


def skip_without(module: str) -> None:
    """Skip the test where there is no such module, as distributions leave out most of the package `test`."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that has it
        found = None
    if found is None:
        pytest.skip(f"this Python comes without {module}")
