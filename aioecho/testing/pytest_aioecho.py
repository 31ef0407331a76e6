"""The pytest plugin: the fixture `aioecho_server`.

pytest imports it at each start, in every project that has aioecho installed. So it is installed as a module beside the package,
`pytest_aioecho`: pytest imports nothing of aioecho before a test uses the fixture.
"""

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest

__all__ = ["aioecho_server", "pytest_pyfunc_call"]

NAME = "aioecho_server"


@pytest.fixture
def aioecho_server() -> Iterator[Any]:
    """Serve handlers until the end of the test: ``server = aioecho_server(Upper)`` listens on a port of 127.0.0.1.

    It gives an aioecho.BackgroundServer, as the server has a thread and an event loop of its own: for coroutines of any plugin
    and for synchronous tests. What a handler raises fails the test. See aioecho.testing for the arguments.
    """
    from aioecho.testing.factory import ServerFactory

    factory = ServerFactory()
    yield factory
    factory.fail()


def _shut_down_with_function(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Shut the servers down when the test's function has returned: what handlers raise is its failure, not its teardown's."""
    try:
        result = yield
    except BaseException as error:
        if (factory := _find_factory(pyfuncitem)) is not None:
            factory.fail(error)
        raise
    if (factory := _find_factory(pyfuncitem)) is not None:
        factory.fail()
    return result


# With pluggy before 1.2, such as Debian 12 has, it is the fixture's teardown that fails. An error here would end every pytest.
with contextlib.suppress(TypeError):
    pytest_pyfunc_call = pytest.hookimpl(wrapper=True)(_shut_down_with_function)


def _find_factory(pyfuncitem: pytest.Function) -> Any:
    """Return what the fixture gave to a test; None without it, or if the user has a fixture of this name."""
    module = sys.modules.get("aioecho.testing.factory")
    found = pyfuncitem.funcargs.get(NAME)
    return found if module is not None and isinstance(found, module.ServerFactory) else None
