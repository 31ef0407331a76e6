"""The client: connections to servers, made once or again and again, and the exchange that ``aioecho send`` does."""

from aioecho.client.backoff import Backoff
from aioecho.client.connecting import Connecting, connect
from aioecho.client.connection import Connection
from aioecho.client.exchange import exchange
from aioecho.client.opening import explain, open_connection

__all__ = ["Backoff", "Connecting", "Connection", "connect", "exchange", "explain", "open_connection"]
