"""TLS of a blocking handler's connection: the handshake, in its thread, and the end."""

import contextlib
import errno
import select
import socket
import ssl
import threading
from time import monotonic

from aioecho.blocking.sockets import RequestSocket
from aioecho.blocking.tls_sockets import with_tls_of_requests

__all__ = ["end_tls", "wrap"]

# What a TLS connection whose read side is shut meets is the end of the stream without TLS's own. wrap_socket() makes of
# that an ordinary end, to the handler; but OpenSSL sends the client an alert, as of a broken protocol, instead of "closed",
# and nothing after it. Connections copy their context's options, so the context has this one only for that moment, as it has
# the class of the sockets that tell what was read and written.
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
_wrapping = threading.Lock()


def wrap(context: ssl.SSLContext, sock: RequestSocket, handshake: float | None) -> ssl.SSLSocket:
    """Wrap a request's socket in TLS, in at most `handshake` seconds, and detach it.

    Raises:
        OSError: the handshake failed, or timed out: the peer's fault.
    """
    owner = sock.owner
    with contextlib.suppress(OSError):  # no TCP
        # The reply would wait for the acknowledgement of TLS 1.3's session tickets, which its client delays by 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with _wrapping:
        options, sslsocket_class = context.options, context.sslsocket_class
        context.options |= IGNORE_UNEXPECTED_EOF
        context.sslsocket_class = with_tls_of_requests(sslsocket_class)  # type: ignore[arg-type]  # classes have a hash
        try:
            _check_connected(sock)
            request = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        finally:
            context.options, context.sslsocket_class = options, sslsocket_class
    request.owner = owner  # type: ignore[attr-defined]
    try:
        timeout = request.gettimeout()
        request.settimeout(0)
        _shake_hands(request, sock, handshake)
        request.settimeout(timeout)
    except BaseException:
        request.close()
        raise
    return request


def _shake_hands(request: ssl.SSLSocket, sock: RequestSocket, seconds: float | None) -> None:
    """Do the handshake, and have `sock` tell when something came last: a Unix socket's kernel does not."""
    deadline = None if seconds is None else monotonic() + seconds
    event = select.POLLIN  # its peer speaks first
    while True:
        left = None if deadline is None else max(deadline - monotonic(), 0)
        poll = select.poll()
        poll.register(request, event)
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError(f"the TLS handshake took longer than {seconds:.4g} seconds")
        if event == select.POLLIN:
            sock.heard_at = monotonic()
        try:
            request.do_handshake()
            return
        except ssl.SSLWantReadError:
            event = select.POLLIN
        except ssl.SSLWantWriteError:
            event = select.POLLOUT


def _check_connected(sock: RequestSocket) -> None:
    """Raise ConnectionResetError if a connection was reset: wrap_socket() would not close what it makes of the socket then."""
    try:
        sock.getpeername()
    except OSError as error:
        raise ConnectionResetError(
            errno.ECONNRESET, "the peer has reset the connection before the handshake"
        ) from error


def end_tls(sock: ssl.SSLSocket) -> None:
    """Tell the peer that there is no more, without waiting for it to say so too."""
    try:
        sock.settimeout(0)
        sock.unwrap()
    except (OSError, ValueError):  # mostly that the peer has not; or it is closed, or the connection broken
        pass
