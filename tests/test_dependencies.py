"""What the package needs: it installs without a compiler on every Python that it is for."""

import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import aioecho

ROOT = Path(aioecho.__file__).parent.parent


def _project() -> dict[str, Any]:
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("pyproject.toml is not installed")
    project: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))["project"]
    return project


def _needed(texts: Iterable[str], extra: str = "") -> Iterator[metadata.Distribution]:
    """Yield what is installed of these requirements, and of what they require."""
    for requirement in map(Requirement, texts):
        if requirement.name == "aioecho" or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": extra})
        ):
            continue
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        yield found
        for extra_of_it in ("", *requirement.extras):
            yield from _needed(found.requires or [], extra_of_it)


def test_no_dependency_of_any_extra_was_compiled_here() -> None:
    project = _project()
    extras = project["optional-dependencies"].values()
    needed = {found.name: found for found in _needed(itertools.chain(project["dependencies"], *extras))}
    assert {"click", "pytest", "uvloop"} <= needed.keys()
    compiled = []
    for name, found in needed.items():
        if (found.read_text("INSTALLER") or "").strip() not in ("pip", "uv"):
            continue  # a distribution's own package
        tags = re.findall(r"^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE)
        platforms = {tag.rpartition("-")[2] for tag in tags}
        # A package index takes no wheel that is for linux as such: it stands only on one that was built on the machine.
        if not platforms or any(platform.startswith("linux_") for platform in platforms):
            compiled.append((name, found.version, tags))
    assert compiled == []


@pytest.mark.once
def test_the_classifiers_name_the_pythons_that_are_tested() -> None:
    project = _project()
    prefix = "Programming Language :: Python :: "
    named = [text.removeprefix(prefix) for text in project["classifiers"] if text.startswith(prefix)]
    assert named == ["3.11", "3.12", "3.13", "3.14", "3.15"]
    assert project["requires-python"] == ">=3.11"
