"""A kit for tests of handlers and of clients: a client without a network, and faults on purpose.

:func:`connect` and :func:`connect_sync` serve a handler for one test and give a client of it. :class:`FaultyProxy` stands
between any client and any server, and delays, cuts and resets what passes. For pytest there is the fixture `aioecho_server`.
"""

from aioecho.testing.blocking import BlockingClient, BlockingDatagramClient, connect_sync
from aioecho.testing.client import Client, DatagramClient, connect
from aioecho.testing.pipes import Faults
from aioecho.testing.proxy import FaultyProxy

__all__ = [
    "BlockingClient",
    "BlockingDatagramClient",
    "Client",
    "DatagramClient",
    "Faults",
    "FaultyProxy",
    "connect",
    "connect_sync",
]
