"""Handler classes that can't work are refused when the server is made, and all others let through."""

import asyncio
import functools
import socketserver
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, ask

import aioecho
from aioecho.echo import DatagramEcho
from aioecho.serving.handler_types import check_handler_class

Base = aioecho.StreamRequestHandler


class Echo(Base):
    async def handle(self) -> None:
        async for line in self.reader:
            await self.send(line)


class Plain:
    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        self.request = request


class Yields(Base):
    def handle(self) -> Iterator[int]:  # type: ignore[override]
        yield 1


class AsyncYields(aioecho.DatagramRequestHandler):
    async def handle(self) -> AsyncIterator[bytes]:  # type: ignore[override,misc]
        yield self.data


async def factory(request: Any, client_address: Any, server: Any) -> Echo:
    return Echo(request, client_address, server)


async def starred(*arguments: Any) -> Echo:
    return Echo(*arguments)


class Factory:
    async def __call__(self, request: Any, client_address: Any, server: Any) -> Echo:
        return Echo(request, client_address, server)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (7, "RequestHandlerClass must be callable, not 7"),
        (Base, r"StreamRequestHandler has no handle\(\): a handler class defines"),
        (functools.partial(Base), r"StreamRequestHandler has no handle\(\)"),
        (Yields, r"the handle\(\) of Yields makes generators, which cannot be awaited: .* without `yield`"),
        (AsyncYields, r"the handle\(\) of AsyncYields makes generators"),
        (factory, "factory is a coroutine function, and RequestHandlerClass is called without `await`: give a class"),
        (functools.partial(factory), "factory is a coroutine function"),
        (starred, "starred is a coroutine function"),
        (Factory(), "Factory object at .* is a coroutine function"),
    ],
)
def test_what_can_not_serve_is_refused_when_the_server_is_made(kind: Any, message: str) -> None:
    endpoint = "udp://127.0.0.1:0" if kind is AsyncYields else "tcp://127.0.0.1:0"
    with pytest.raises(TypeError, match=message):
        aioecho.serve(kind, endpoint)
    if kind is not AsyncYields:
        with pytest.raises(TypeError, match=message):
            aioecho.serve({Echo: "tcp://127.0.0.1:0", kind: "tcp://127.0.0.1:0"})


def logged(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Awaitable[None]:
        return function(*arguments)

    return wrapper


class Delegates(Base):
    def handle(self) -> Awaitable[None]:  # type: ignore[override]
        return self._handle()

    async def _handle(self) -> None:
        await self.send(b"done\n")


class MayDelegate(Delegates):
    def handle(self, flag: Any = None) -> Any:
        return flag or None


class MayDelegateOtherwise(Delegates):
    def handle(self, flag: Any = None) -> Any:
        return flag and None


class Tries(Delegates):
    def handle(self) -> Any:
        try:
            if self.request is None:
                return None
            return self._handle()
        finally:
            self.tried = True


class Raises(Delegates):
    def handle(self) -> Any:
        raise ValueError("at once")


class Decorated(Delegates):
    handle = logged(Delegates._handle)  # type: ignore[assignment]


class Partial(Delegates):
    handle = functools.partialmethod(Delegates._handle)  # type: ignore[assignment]


class Lambda(Delegates):
    handle = lambda self: self._handle()  # noqa: E731


class OfGenerator(Delegates):
    @types.coroutine
    def handle(self) -> Any:
        yield from self._handle().__await__()


class Property(Delegates):
    @property
    def handle(self) -> Any:
        return self._handle


class InConstructor(Plain):
    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        super().__init__(request, client_address, server)
        self.handle = Delegates(request, client_address, server).handle


class InSlot(InConstructor):
    __slots__ = ("handle",)


class ByAttribute(Plain):
    def __getattr__(self, name: str) -> Any:
        return getattr(Delegates(self.request, None, None), name)  # type: ignore[arg-type]


class MakesAnother:
    def __new__(cls, request: Any, client_address: Any, server: Any) -> Any:
        return Delegates(request, client_address, server)


class Meta(type):
    def __call__(cls, request: Any, client_address: Any, server: Any) -> Any:
        return Delegates(request, client_address, server)


class MadeByMeta(metaclass=Meta):
    pass


class Static(Plain):
    @staticmethod
    async def handle() -> None:
        pass


class Bound(Plain):
    handle = Echo.send  # a coroutine function of any kind


class Blocking(socketserver.BaseRequestHandler):
    pass


@pytest.mark.parametrize(
    "kind",
    [
        *(Echo, Delegates, MayDelegate, MayDelegateOtherwise, Tries, Raises, Decorated, Partial, Lambda, OfGenerator),
        *(Property, InConstructor, InSlot, ByAttribute, MakesAnother, MadeByMeta, Static, Bound, Blocking),
        *(functools.partial(Echo), lambda *arguments: Echo(*arguments), Echo.__call__, print),
    ],
)
def test_what_may_serve_is_let_through(kind: Any) -> None:
    check_handler_class(kind)


@pytest.mark.parametrize(
    "kind", [Delegates, Tries, Decorated, Partial, Lambda, OfGenerator, Property, MakesAnother, MadeByMeta]
)
async def test_a_handle_that_returns_what_can_be_awaited_serves(kind: Any) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0") as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read() == b"done\n"
        writer.close()
        await writer.wait_closed()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What asyncio.start_server() takes."""
    writer.write((await reader.readline()).upper())
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("function", [talk, functools.partial(talk)])
async def test_a_coroutine_function_serves_streams(function: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, function) as server:
        assert await ask(server, b"hello\n") == b"HELLO\n"
        assert server.RequestHandlerClass.__qualname__ == "talk"
        await settle(lambda: not server.connections)
        assert server.stats.completed == 1
    async with aioecho.serve({function: "tcp://127.0.0.1:0", Echo: "tcp://127.0.0.1:0"}) as server:
        assert await ask(server, b"hello\n") == b"HELLO\n"


def test_a_server_class_is_no_handler_class() -> None:
    for kind in (aioecho.TCPServer, socketserver.TCPServer):
        with pytest.raises(TypeError, match="TCPServer is a server: give the handler class"):
            aioecho.serve(kind, "tcp://127.0.0.1:0")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"process_request": lambda self, request, client_address: None}, r"Mine.process_request .*aioecho.compat"),
        ({"request_queue_size": 5}, r"Mine.request_queue_size is socketserver's.*Limits\(backlog=...\)"),
        ({"service_actions": lambda self: None}, r"Mine.service_actions .*lifespan="),
    ],
)
def test_socketservers_hooks_are_refused_with_what_replaces_them(attributes: dict[str, Any], message: str) -> None:
    for base in (aioecho.TCPServer, aioecho.UDPServer):
        kind = type("Mine", (base,), {"__module__": "mine", **attributes})
        handler_class = Echo if base is aioecho.TCPServer else DatagramEcho
        with pytest.raises(TypeError, match=message):
            kind(ANYWHERE, handler_class)
