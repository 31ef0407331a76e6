"""A driven coroutine is a plain task's: the same awkward handlers, run in both ways and with asyncio's own reader, must
make the same observations."""

import asyncio
import contextlib
import contextvars
import gc
import inspect
import socket
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

import pytest
from driven import drive

from aioecho.runtime.driver import Driver
from aioecho.runtime.steps import steps
from aioecho.streams.protocol import StreamProtocol

VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("VARIABLE", default="unset")


class Stage:
    """What a handler and its peer share: the stream, the peer's socket, and a log of what was observed."""

    def __init__(self, reader: asyncio.StreamReader, transport: asyncio.Transport, peer: socket.socket) -> None:
        self.reader, self.transport, self.peer = reader, transport, peer
        self.seen: list[Any] = []
        self.event = asyncio.Event()
        self.reached: dict[str, asyncio.Event] = {}
        self.task: asyncio.Task[Any]

    def see(self, *what: Any) -> None:
        current = asyncio.current_task()
        self.seen.append((*what, "own task" if current is self.task else "another task", VARIABLE.get()))

    def see_error(self, error: BaseException) -> None:
        arguments = [type(each).__name__ for each in getattr(error, "exceptions", ())] or [repr(a) for a in error.args]
        self.see(type(error).__name__, arguments, self.task.cancelling())

    def at(self, place: str) -> asyncio.Event:
        return self.reached.setdefault(place, asyncio.Event())

    async def turns(self, count: int = 8) -> None:
        """Let everything that can happen now happen: a real poll comes with each turn."""
        for _ in range(count):
            await asyncio.sleep(0)


Handler = Callable[[Stage], Awaitable[Any]]


async def perform(kind: str, handler: Handler, peer: Handler) -> list[Any]:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    if kind == "asyncio":
        reader = asyncio.StreamReader(loop=loop)
        protocol: Any = asyncio.StreamReaderProtocol(reader, loop=loop)
    else:
        protocol = StreamProtocol(loop, is_server_side=False)
        reader = protocol.reader
    transport, _ = await loop.create_connection(lambda: protocol, sock=ours)
    stage = Stage(reader, transport, theirs)

    async def connection() -> Any:
        try:
            result = await handler(stage)
            stage.see("returned", result)
        except asyncio.CancelledError as error:
            stage.see_error(error)
            raise
        except BaseException as error:
            stage.see_error(error)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # what comes late, a cancellation, comes here
            stage.see("after")
            return
        stage.see("cancelled after", stage.task.cancelling())

    if kind == "driven":
        stage.task = drive(connection(), protocol)
    else:
        stage.task = loop.create_task(connection(), context=contextvars.copy_context())
    await peer(stage)
    try:
        async with asyncio.timeout(20):
            await asyncio.wait([stage.task])
    except TimeoutError:
        stage.seen.append("hangs")
        stage.task.cancel()
    stage.seen.append(("ended cancelled", stage.task.cancelled()))
    transport.abort()
    theirs.close()
    await stage.turns()
    return stage.seen


async def same_for_all(handler: Handler, peer: Handler, *, also_asyncio: bool = True) -> list[Any]:
    plain = await perform("task", handler, peer)
    assert await perform("driven", handler, peer) == plain
    if also_asyncio:
        assert await perform("asyncio", handler, peer) == plain
    assert "hangs" not in plain
    return plain


def lines(*, gap: int = 4) -> Handler:
    """Return a peer that sends ten numbered lines, some turns apart, and closes its side."""

    async def peer(stage: Stage) -> None:
        for number in range(10):
            await stage.turns(gap)
            stage.peer.send(b"line %d\n" % number)
        await stage.turns(gap)
        stage.peer.shutdown(socket.SHUT_WR)

    return peer


async def nothing(stage: Stage) -> None:
    await stage.turns()


async def read_to_the_end(s: Stage) -> str:
    while line := await s.reader.readline():
        s.see(line)
    return "end"


async def all_kinds_of_reads(s: Stage) -> None:
    s.see(await s.reader.readline())
    s.see(await s.reader.readexactly(3))
    s.see(await s.reader.readuntil(b"2"))
    s.see(await s.reader.read(1))
    async for line in s.reader:
        s.see(line)
    s.see(s.reader.at_eof())
    await s.reader.readexactly(1)


async def timeouts(s: Stage) -> None:
    for _ in range(3):
        try:
            async with asyncio.timeout(0.01):
                await s.reader.readline()
        except TimeoutError as error:
            s.see_error(error)
    try:
        await asyncio.wait_for(s.reader.readline(), 0.01)
    except TimeoutError as error:
        s.see_error(error)
    try:
        async with asyncio.timeout(0):
            await s.reader.readline()
    except TimeoutError as error:
        s.see_error(error)
    s.at("tired").set()
    async with asyncio.timeout(5):
        s.see(await s.reader.readline())
    s.see(await asyncio.wait_for(s.reader.readline(), 5))


async def two_lines_when_tired(s: Stage) -> None:
    await s.at("tired").wait()
    await s.turns()
    s.peer.send(b"one\n")
    await s.turns()
    s.peer.send(b"two\n")


async def task_group(s: Stage) -> None:
    async def reads() -> None:
        s.see(await s.reader.readline())

    async with asyncio.TaskGroup() as group:
        group.create_task(reads())
    s.see(await s.reader.readline())
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(reads())
            group.create_task(fails(s))
    except* ValueError as errors:
        s.see_error(errors)
    s.see(await s.reader.readline())
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(fails(s))
            s.see(await s.reader.readline())
            await s.reader.read()  # cancelled by the group
    except* ValueError as errors:
        s.see_error(errors)


async def fails(s: Stage) -> None:
    await asyncio.sleep(0)
    raise ValueError("of a child")


async def gathers(s: Stage) -> None:
    s.see(await asyncio.gather(s.reader.readline(), asyncio.sleep(0, "slept")))
    results = await asyncio.gather(s.reader.readline(), s.reader.readline(), return_exceptions=True)
    s.see([type(each).__name__ for each in results])
    s.see(await s.reader.readline())


async def shields(s: Stage) -> None:
    reading = asyncio.ensure_future(s.reader.readline())
    try:
        async with asyncio.timeout(0.01):
            await asyncio.shield(reading)
    except TimeoutError as error:
        s.see_error(error)
    s.at("tired").set()
    s.see(await reading)
    s.see(await s.reader.readline())


async def child_tasks(s: Stage) -> None:
    async def pump(queue: asyncio.Queue[bytes]) -> None:
        VARIABLE.set("of the child")
        async for line in s.reader:
            await queue.put(line)
            s.see("pumped")
        await queue.put(b"")

    queue: asyncio.Queue[bytes] = asyncio.Queue(1)
    task = asyncio.create_task(pump(queue))
    while line := await queue.get():
        s.see(line)
    await task


async def context_variables(s: Stage) -> None:
    token = VARIABLE.set("first")
    s.see(await s.reader.readline())
    VARIABLE.reset(token)
    s.see(await s.reader.readline())
    token = VARIABLE.set("second")
    await asyncio.sleep(0)
    s.see(await s.reader.readline())
    VARIABLE.reset(token)
    VARIABLE.set("last")
    await asyncio.create_task(sees(s))


async def sees(s: Stage) -> None:
    s.see("child")


async def other_waits(s: Stage) -> None:
    loop = asyncio.get_running_loop()
    s.see(await s.reader.readline())
    await asyncio.sleep(0)
    s.see(await s.reader.readline())
    await asyncio.sleep(0.001)
    done = loop.create_future()
    done.set_result("done")
    s.see(await done)
    s.see(await s.reader.readline(), await asyncio.to_thread(str, 1))
    soon = loop.create_future()
    loop.call_soon(soon.set_result, "soon")
    s.see(await soon)
    broken = loop.create_future()
    loop.call_soon(broken.set_exception, KeyError("broken"))
    try:
        await broken
    except KeyError as error:
        s.see_error(error)
    s.see(await s.reader.readline())
    lost = loop.create_future()
    loop.call_soon(lost.cancel)
    try:
        await lost
    except asyncio.CancelledError as error:
        s.see_error(error)
    s.see(await s.reader.readline())


async def bad_awaits(s: Stage) -> None:
    @types.coroutine
    def yields(what: Any) -> Any:
        yield what

    s.see(await s.reader.readline())
    for what in (42, asyncio.current_task(), asyncio.get_running_loop().create_future()):
        try:
            await yields(what)
        except RuntimeError as error:
            s.see(type(error).__name__, str(error).split(" <")[0].split(":")[0][:9])
    s.see(await s.reader.readline())


async def cancels_itself(s: Stage) -> None:
    for _ in range(2):
        s.see(await s.reader.readline())
        s.task.cancel("by myself")
        try:
            await s.reader.readline()
        except asyncio.CancelledError as error:
            s.see_error(error)
        s.task.uncancel()
    s.see(await s.reader.readline())
    s.task.cancel()
    try:
        await s.event.wait()
    except asyncio.CancelledError as error:
        s.see_error(error)
    s.task.uncancel()
    s.see(await s.reader.readline())
    s.task.cancel()
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError as error:
        s.see_error(error)
    s.task.uncancel()
    s.see(await s.reader.readline())
    s.task.cancel("at the very end")


async def cancels_itself_and_raises(s: Stage) -> None:
    s.see(await s.reader.readline())
    s.task.cancel()
    raise LookupError("instead")


async def changes_its_mind(s: Stage) -> None:
    s.see(await s.reader.readline())
    s.task.cancel()
    s.task.uncancel()
    try:
        s.see(await s.reader.readline())
    except asyncio.CancelledError as error:
        s.see_error(error)


async def generators(s: Stage) -> None:
    async def numbered() -> AsyncIterator[tuple[int, bytes]]:
        number = 0
        try:
            async for line in s.reader:
                yield number, line
                number += 1
        finally:
            s.see("closing")
            await asyncio.sleep(0)
            s.see("closed")

    async with contextlib.aclosing(numbered()) as first:
        async for number, line in first:
            s.see(number, line)
            if number == 2:
                break
    async for number, line in numbered():
        s.see(number, line)


async def closes_late(s: Stage) -> None:
    async def forgotten() -> AsyncIterator[bytes]:
        try:
            while True:
                yield await s.reader.readline()
        finally:
            await asyncio.sleep(0)
            s.at("closed").set()

    iterator = forgotten()
    s.see(await anext(iterator))
    del iterator
    gc.collect()
    await s.at("closed").wait()
    s.see(await s.reader.readline())


@pytest.mark.parametrize(
    "handler",
    [
        read_to_the_end,
        all_kinds_of_reads,
        task_group,
        gathers,
        child_tasks,
        context_variables,
        other_waits,
        bad_awaits,
        cancels_itself,
        cancels_itself_and_raises,
        changes_its_mind,
        generators,
        closes_late,
    ],
)
async def test_awkward_handlers_cannot_tell(handler: Handler) -> None:
    await same_for_all(handler, lines())


@pytest.mark.parametrize("handler", [timeouts, shields])
async def test_what_times_out_cannot_tell(handler: Handler) -> None:
    await same_for_all(handler, two_lines_when_tired)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        KeyError(1),
        asyncio.CancelledError("raised"),
        StopIteration(1),
        GeneratorExit(),
        BaseException("b"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("reads_first", [0, 1, 3])
async def test_an_exception_of_any_kind_comes_out_as_from_a_task(error: BaseException, reads_first: int) -> None:
    async def raises(s: Stage) -> None:
        for _ in range(reads_first):
            s.see(await s.reader.readline())
        raise error.with_traceback(None)

    await same_for_all(raises, lines())


async def stubborn(s: Stage) -> str:
    """Go through every kind of wait, and see each cancellation, wherever it comes."""

    async def step(what: Callable[[], Awaitable[Any]]) -> None:
        try:
            s.see(await what())
        except asyncio.CancelledError as error:
            s.see_error(error)
            s.task.uncancel()
            try:
                await asyncio.sleep(0)
            finally:
                s.see("cleaned")

    await step(s.reader.readline)
    await step(lambda: asyncio.sleep(0))
    await step(lambda: s.reader.read(4))
    await step(lambda: asyncio.sleep(0.002))
    await step(lambda: asyncio.wait_for(s.reader.readline(), 5))
    await step(lambda: asyncio.shield(s.reader.readline()))
    await step(s.reader.readline)
    return "end"


async def test_it_is_cancelled_at_every_await_as_a_task_is() -> None:
    async def after(count: int, s: Stage) -> None:
        async def cancel() -> None:
            for _ in range(count):
                await asyncio.sleep(0)
            s.task.cancel(f"after {count}")

        # Which wait it meets depends on the turns that each way takes, so each way is judged by what must always hold.
        cancelling = asyncio.create_task(cancel())
        await lines(gap=3)(s)
        await cancelling

    for count in range(45):
        for kind in ("task", "driven", "asyncio"):
            seen = await perform(kind, stubborn, lambda s, count=count: after(count, s))  # type: ignore[misc]
            errors = [each for each in seen if each[0] == "CancelledError"]
            assert len(errors) <= 1, (kind, count, seen)
            if errors:
                assert errors[0][1:4] == ([f"'after {count}'"], 1, "own task"), (kind, count, seen)
            # What was read is there in order; a cancelled read may have taken a piece with it.
            sent, position = b"".join(b"line %d\n" % n for n in range(10)), 0
            for piece in (each[0] for each in seen if isinstance(each[0], bytes)):
                found = sent.find(piece, position)
                assert found == position or (errors and found > position), (kind, count, seen)
                position = found + len(piece)
            assert "hangs" not in seen, (kind, count)


@pytest.mark.parametrize("waits", ["reader", "event", "sleep"])
@pytest.mark.parametrize("first", ["data", "cancel"])
async def test_data_and_a_cancellation_in_one_turn(waits: str, first: str) -> None:
    async def handler(s: Stage) -> None:
        s.see(await s.reader.readline())
        try:
            if waits == "reader":
                s.see(await s.reader.readline())
            elif waits == "event":
                await s.event.wait()
            else:
                await asyncio.sleep(1000)
        except asyncio.CancelledError as error:
            s.see_error(error)
            s.task.uncancel()
        s.see(await s.reader.readline())

    async def peer(s: Stage) -> None:
        s.peer.send(b"one\n")
        await s.turns()
        if first == "data":
            # The loop learns of the data and of the cancellation in the same turn, in this order or in the other.
            s.peer.send(b"two\n")
            s.task.cancel("now")
        else:
            s.task.cancel("now")
            s.peer.send(b"two\n")
        await s.turns()
        s.peer.send(b"three\n")

    await same_for_all(handler, peer)


# Python's own error, for what had ended and was awaited on, took the place of the cancellation.
async def test_a_cancellation_just_before_the_end_counts_though_an_event_steps_to_that() -> None:
    loop = asyncio.get_running_loop()
    protocol = StreamProtocol(loop, is_server_side=False)

    async def cancels_itself_last() -> None:
        await protocol.reader.readline()
        task.cancel("by itself")

    task = drive(cancels_itself_last(), protocol)
    await asyncio.sleep(0)
    loop.call_soon(protocol.data_received, b"line\n")
    await asyncio.wait([task])
    assert task.cancelled()
    with pytest.raises(asyncio.CancelledError, match="by itself"):
        await task
    assert task.cancelling() == 1


# It went on, and waited: "coroutine ignored GeneratorExit", for every connection that only waited for its peer to close too.
async def test_a_coroutine_that_waits_for_no_event_any_more_can_be_closed() -> None:
    loop = asyncio.get_running_loop()
    protocol = StreamProtocol(loop, is_server_side=False)
    seen: list[BaseException | None] = []

    class Parked(Driver):
        __slots__ = ()

        def note_inner_end(self, end: BaseException | None) -> None:
            """Leave the task parked, as a connection's."""

    async def outermost() -> None:
        reading = protocol.reader.readline()
        driver.step_inner(reading)
        try:
            await reading
        except BaseException as error:
            seen.append(driver.take_inner_end(error))

    protocol.driver = driver = Parked()
    driver.start(outermost(), loop, contextvars.copy_context(), "driven")
    await asyncio.sleep(0)
    loop.call_soon(protocol.data_received, b"line\n")
    await asyncio.sleep(0)
    coroutine: Any = driver.task.get_coro()
    coroutine.close()
    assert [type(each) for each in seen] == [GeneratorExit]
    loop.call_soon(driver.go_on)
    await asyncio.wait([driver.task])
    assert isinstance(driver.task.exception(), RuntimeError)


async def test_cancelled_and_fed_in_the_same_callback_no_byte_is_lost() -> None:
    async def handler(s: Stage) -> None:
        try:
            await s.reader.readline()
        except asyncio.CancelledError as error:
            s.see_error(error)
            s.task.uncancel()
        s.see(await s.reader.readline())

    for feeds_first in (True, False):

        async def peer(s: Stage, feeds_first: bool = feeds_first) -> None:
            await s.turns()

            def both() -> None:
                if feeds_first:
                    s.reader.feed_data(b"one\n")
                s.task.cancel()
                if not feeds_first:
                    s.reader.feed_data(b"one\n")

            asyncio.get_running_loop().call_soon(both)

        await same_for_all(handler, peer)


async def test_anyone_may_feed_end_and_break_the_stream() -> None:
    async def handler(s: Stage) -> None:
        s.see(await s.reader.readexactly(6))
        s.see(await s.reader.read(100))
        try:
            await s.reader.read(100)
        except OSError as error:
            s.see_error(error)

    async def peer(s: Stage) -> None:
        await s.turns()
        s.reader.feed_data(b"abc")  # from a task
        await s.turns()
        asyncio.get_running_loop().call_soon(s.reader.feed_data, b"defghi")  # from a callback
        await s.turns()
        s.reader.set_exception(OSError("broken"))

    await same_for_all(handler, peer)


async def test_data_that_is_received_while_another_task_is_current_waits_its_turn() -> None:
    async def handler(s: Stage) -> None:
        s.see(await s.reader.readline())
        s.see(await s.reader.readline())

    async def peer(s: Stage) -> None:
        await s.turns()
        protocol: Any = s.transport.get_protocol()
        protocol.data_received(b"one\n")
        s.see("still here")
        await s.turns()
        protocol.data_received(b"tw")
        protocol.data_received(b"o\n")

    await same_for_all(handler, peer)


async def test_an_abandoned_coroutine_ends_though_it_swallows_cancellation() -> None:
    seen = []

    async def swallows() -> None:
        try:
            while True:
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    seen.append("swallowed")
        finally:
            seen.append("closed")

    driver = Driver()

    async def outermost() -> None:
        try:
            await swallows()
        except BaseException:
            raise (asyncio.CancelledError() if driver._is_abandoned else AssertionError()) from None

    driver.start(outermost(), asyncio.get_running_loop(), contextvars.copy_context(), "driven")
    task = driver.task
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    driver.abandon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["swallowed"] * 3 + ["closed"]


async def test_what_is_made_of_steps_is_a_coroutine_like_any() -> None:
    future = asyncio.get_running_loop().create_future()

    @steps
    def wait(result: str) -> Generator[Any, None, str]:
        yield from asyncio.sleep(0).__await__()
        yield from future
        return result

    assert inspect.iscoroutinefunction(wait)
    waiting = [asyncio.create_task(wait("task")), asyncio.ensure_future(asyncio.wait_for(wait("wait_for"), 5))]
    cancelled = asyncio.create_task(wait("never"))
    await asyncio.sleep(0)
    cancelled.cancel()
    future.get_loop().call_soon(future.set_result, None)
    assert await wait("awaited") == "awaited"
    assert await asyncio.gather(*waiting) == ["task", "wait_for"]
    assert cancelled.cancelled()
    with pytest.warns(RuntimeWarning, match="never awaited"):
        wait("forgotten")


@pytest.mark.parametrize("waits", ["event", "turn", "done", "never", "child"])
async def test_it_is_cancelled_right_behind_the_step_that_left_the_stream(waits: str) -> None:
    """Between a step and the task that takes over, a cancellation must reach what the coroutine waits for by then."""

    async def handler(s: Stage) -> None:
        s.see(await s.reader.readline())
        loop = asyncio.get_running_loop()
        what: Any
        if waits == "event":
            what = s.event.wait()
        elif waits == "turn":
            what = asyncio.sleep(0)
        elif waits == "child":
            what = loop.create_task(swallows_once(s))
        else:
            what = loop.create_future()
            if waits == "done":
                what.set_result(None)
        try:
            s.see(await what)
        except asyncio.CancelledError as error:
            s.see_error(error)
            s.task.uncancel()
        s.see(isinstance(what, asyncio.Future) and what.cancelled())
        s.see(await s.reader.readline())

    async def swallows_once(s: Stage) -> str:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            s.see("child cancelled")
        return "child's result"

    async def peer(s: Stage) -> None:
        await s.turns()
        protocol: Any = s.transport.get_protocol()

        def step_and_cancel() -> None:
            protocol.data_received(b"one\n")
            s.task.cancel("right behind")

        asyncio.get_running_loop().call_soon(step_and_cancel)
        await s.turns()
        s.peer.send(b"two\n")

    await same_for_all(handler, peer, also_asyncio=False)


async def test_what_is_fed_while_nobody_can_be_woken_is_not_missed() -> None:
    async def handler(s: Stage) -> None:
        s.see(await s.reader.readline())
        s.task.cancel()
        s.task.uncancel()
        try:
            s.see(await s.reader.readline())
        except asyncio.CancelledError as error:
            s.see_error(error)
            s.see(await s.reader.readline())

    async def peer(s: Stage) -> None:
        await s.turns()
        protocol: Any = s.transport.get_protocol()

        def step_and_feed() -> None:
            protocol.data_received(b"one\n")
            s.reader.feed_data(b"two\n")

        asyncio.get_running_loop().call_soon(step_and_feed)

    await same_for_all(handler, peer, also_asyncio=False)
