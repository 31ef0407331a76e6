"""Messages of publish() between worker processes: a worker tells the supervisor, which tells the other workers.

Neither waits. Where too much is unsent the message is dropped, and counted in the stats of a worker: of the one that
publishes it, if it does not reach the supervisor, or else of every worker that misses it.
"""

import asyncio
import base64
from collections.abc import Collection, Mapping
from typing import Any

from aioecho.serving.base import BaseServer
from aioecho.workers.channel import Channel
from aioecho.workers.slots import WorkerProcess

__all__ = ["MOST_UNSENT", "Publishing", "Relay"]

MOST_UNSENT = 2**22
"""Bytes that may be unsent in a channel for a message to be added. So stats, orders and signs of life find room."""


class Publishing:
    """A worker's side: sends what its server publishes, and has it deliver what others have published."""

    def __init__(self, server: BaseServer, channel: Channel) -> None:
        self._server = server
        self._channel = channel
        server.relay = self._send

    def _send(self, topic: str, data: bytes, full: str) -> bool:
        return self._channel.unsent <= MOST_UNSENT and self._channel.send(
            "publish", topic=topic, data=base64.b64encode(data).decode("ascii"), full=full
        )

    def on_published(self, message: Mapping[str, Any]) -> None:
        """Deliver a message "published"."""
        self._server.deliver(message["topic"], base64.b64decode(message["data"]), message["full"])

    def on_unpublished(self, message: Mapping[str, Any]) -> None:
        """Count the messages that a message "unpublished" tells of."""
        self._server.note_unpublished(message["count"])


class Relay:
    """The supervisor's side: passes a message of a worker on to the others.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
    """

    def __init__(self, workers: Collection[WorkerProcess]) -> None:
        self._workers = workers
        self._dropped: dict[WorkerProcess, int] = {}  # that it was not told of yet
        self._tasks: set[asyncio.Task[None]] = set()

    def on_publish(self, sender: WorkerProcess, message: Mapping[str, Any]) -> None:
        """Pass on a message "publish"."""
        values = {name: message[name] for name in ("topic", "data", "full")}
        for worker in self._workers:
            if worker is sender or not worker.may_have_clients:
                continue
            if worker.channel.unsent > MOST_UNSENT:
                self._drop(worker)
            else:
                worker.channel.send("published", **values)

    def _drop(self, worker: WorkerProcess) -> None:
        if worker in self._dropped:
            self._dropped[worker] += 1
            return
        self._dropped[worker] = 1
        task = asyncio.get_running_loop().create_task(self._tell(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, worker: WorkerProcess) -> None:
        """Tell a worker how many messages it has missed, once it reads on, or has ended."""
        await worker.channel.drain()
        worker.channel.send("unpublished", count=self._dropped.pop(worker))
