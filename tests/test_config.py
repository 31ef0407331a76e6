"""What a user sets wrong is refused when it is set, by a message that names it."""

import dataclasses
import functools
import math
import ssl
from typing import Any

import pytest

import aioecho
from aioecho.echo import Echo

ANYWHERE = ("127.0.0.1", 0)
COUNTS = ["max_connections", "max_per_host", "max_threads", "backlog", "max_buffer", "max_write_buffer"]
SECONDS = ["handshake", "idle", "message", "write", "max_age", "linger"]


def test_the_defaults_are_these() -> None:
    assert aioecho.Limits() == aioecho.Limits(
        max_connections=None,
        overflow="wait",
        max_per_host=None,
        accept_rate=None,
        shed=None,
        backlog=2048,
        max_buffer=2**16,
        max_write_buffer=2**24,
    )
    assert aioecho.Timeouts() == aioecho.Timeouts(
        handshake=10, idle=600, message=60, write=60, max_age=None, max_age_jitter=0.1, linger=0.5
    )


@pytest.mark.parametrize("kind", [aioecho.Limits, aioecho.Timeouts])
def test_limits_and_timeouts_are_frozen_and_named(kind: Any) -> None:
    made = kind()
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 1)
    with pytest.raises(TypeError):
        kind(1)
    assert made == kind()
    assert hash(made) == hash(kind())


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, 10.0, True, "10", math.inf, 2**40])
def test_a_limit_that_is_no_count_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        aioecho.Limits(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["backlog", "max_buffer", "max_threads"])
def test_some_limits_can_not_be_none(name: str) -> None:
    for other in set(COUNTS) - {"backlog", "max_buffer", "max_threads"}:
        assert getattr(aioecho.Limits(**{other: None}), other) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} .*None"):
        aioecho.Limits(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, True, "10", 1j])
def test_a_timeout_that_is_no_time_is_refused(name: str, value: object) -> None:
    if name == "linger" and value == 0 and value is not False:
        assert aioecho.Timeouts(linger=0).linger == 0  # which discards what is on its way
        return
    with pytest.raises(ValueError, match=name) as caught:
        aioecho.Timeouts(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [None, 1, 0.001, math.inf])
def test_a_timeout_is_seconds_or_none(name: str, value: Any) -> None:
    assert getattr(aioecho.Timeouts(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("overflow", "drop"),
        ("overflow", None),
        ("shed", "oldest"),
        ("shed", True),
        ("accept_rate", 0),
        ("accept_rate", -1),
        ("accept_rate", math.nan),
        ("accept_rate", math.inf),
        ("accept_rate", "10"),
        ("accept_rate", True),
    ],
)
def test_a_limit_of_another_kind_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        aioecho.Limits(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, None, "0.5", True, math.nan])
def test_a_jitter_that_is_no_part_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="max_age_jitter"):
        aioecho.Timeouts(max_age_jitter=value)


def test_a_handler_class_without_handle_is_refused() -> None:
    class Forgetful(aioecho.StreamRequestHandler):
        pass

    with pytest.raises(TypeError, match=r"Forgetful has no handle\(\)"):
        aioecho.TCPServer(ANYWHERE, Forgetful)
    with pytest.raises(TypeError, match="abstract"):
        Forgetful((None, None), None, None)  # type: ignore[abstract, arg-type]


@pytest.mark.parametrize("thing", [None, "echo", 7])
def test_a_handler_class_that_can_not_be_called_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="RequestHandlerClass must be callable") as caught:
        aioecho.serve(thing, "tcp://127.0.0.1:0")
    assert repr(thing) in str(caught.value)


def test_whatever_makes_a_handler_is_taken() -> None:
    class Greeter(aioecho.StreamRequestHandler):
        def __init__(self, *args: Any, greeting: bytes) -> None:
            super().__init__(*args)
            self.greeting = greeting

        async def handle(self) -> None:
            await self.send(self.greeting)

    aioecho.TCPServer(ANYWHERE, functools.partial(Greeter, greeting=b"Hello"))
    aioecho.TCPServer(ANYWHERE, lambda *args: Greeter(*args, greeting=b"Hello"))


@pytest.mark.parametrize("thing", [True, False, "server.pem", 1])
def test_ssl_that_is_no_context_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"ssl must be an aioecho\.TLS.*, or an ssl\.SSLContext") as caught:
        aioecho.TCPServer(ANYWHERE, Echo, ssl=thing)
    assert repr(thing) in str(caught.value)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_a_context_that_allows_less_than_tls_1_2_is_refused(version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = version
    with pytest.raises(ValueError, match=f"ssl allows {version.name}.*TLSv1_2") as caught:
        aioecho.TCPServer(ANYWHERE, Echo, ssl=context)
    assert "\n" not in str(caught.value)
    assert context.minimum_version is version


def test_a_context_that_leaves_the_versions_to_openssl_gets_tls_1_2() -> None:
    # As the default contexts of Debian's and Ubuntu's Pythons do.
    for make in (aioecho.TCPServer, lambda *arguments, **options: aioecho.serve(Echo, "tcp://127.0.0.1:0", **options)):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        assert make(ANYWHERE, Echo, ssl=context).ssl is context
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_context_that_allows_nothing_from_tls_1_2_on_is_refused() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ValueError, match="ssl allows no version after TLSv1_1: set its maximum_version"):
        aioecho.TCPServer(ANYWHERE, Echo, ssl=context)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_context_for_tls_1_2_or_1_3_is_taken(version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = version
    assert aioecho.TCPServer(ANYWHERE, Echo, ssl=context).ssl is context


@pytest.mark.parametrize("grace", [-1, -0.1, math.nan, "30", True])
def test_a_grace_that_is_no_time_is_refused(grace: Any) -> None:
    with pytest.raises(ValueError, match="grace must be a number of seconds") as caught:
        aioecho.TCPServer(ANYWHERE, Echo, grace=grace)
    assert repr(grace) in str(caught.value)


async def test_a_grace_that_is_no_time_is_refused_by_shutdown_which_then_does_nothing() -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo) as server:
        with pytest.raises(ValueError, match="grace must be a number of seconds"):
            await server.shutdown(-1)
        assert server.is_serving()


@pytest.mark.parametrize(
    "address",
    [
        ("127.0.0.1",),
        ("127.0.0.1", "80"),
        ("127.0.0.1", 65536),
        ("127.0.0.1", -1),
        ("127.0.0.1", 80, "more"),
        (b"127.0.0.1", 80),
        (80, "127.0.0.1"),
        9999,
        (),
    ],
)
def test_an_address_that_is_none_is_refused(address: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\(host, port\)") as caught:
        aioecho.TCPServer(address, Echo)
    assert repr(address) in str(caught.value)


def test_a_server_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an endpoint or a socket"):
        aioecho.serve(Echo)
    with pytest.raises(ValueError, match="needs an endpoint or a socket"):
        aioecho.TCPServer(None, Echo)


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="reuse_port"):
        aioecho.serve(Echo, "tcp://127.0.0.1:0", reuse_port=True)


def test_run_refuses_an_unknown_loop() -> None:
    with pytest.raises(ValueError, match=r"'twisted'.*auto, uvloop, asyncio"):
        aioecho.run(Echo, "tcp://127.0.0.1:0", loop="twisted")


@pytest.mark.parametrize("option", ["limits", "timeouts"])
def test_limits_and_timeouts_are_of_their_classes(option: str) -> None:
    for value in (5, {}, aioecho.Limits() if option == "timeouts" else aioecho.Timeouts()):
        with pytest.raises(TypeError, match=option):
            aioecho.TCPServer(("127.0.0.1", 0), Echo, **{option: value})
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo)
    with pytest.raises(TypeError, match=option):
        setattr(server, option, None)
