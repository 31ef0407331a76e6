#!/usr/bin/env bash
# aiofastnet 1.2.0 on CPython, over uvloop 0.23.0: where it falls back on the standard library's ssl, start_tls() breaks every
# connection.
#
# It does so on a Python whose _ssl is linked statically with OpenSSL (its own warning names uv's builds). Here its switch for
# tests does the same (the context's attribute _aiofastnet_force_fallback_ssl). The protocol that it sets on the transport is then
# not a buffered one (aiofastnet/ssl_transport.pyx: class SSLProtocol), but inherits get_buffer() and buffer_updated() from
# its base class, where they raise NotImplementedError. asyncio's transports go by isinstance(protocol, asyncio.BufferedProtocol).
# uvloop's go by whether the protocol has get_buffer(), so the first bytes of the handshake meet NotImplementedError.
#
# Seen: what a client gets that says "hello" to an echo server.
#   asyncio, OpenSSL itself: b'hello'
#   asyncio, fallback: b'hello'
#   uvloop, OpenSSL itself: b'hello'
#   uvloop, fallback: ConnectionResetError
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, openssl, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiofastnet==1.2.0 uvloop==0.23.0
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout "$work/key" -out "$work/cert" 2>"$work/log"
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import socket
import ssl
import sys
import time

import aiofastnet
import uvloop


class Echo(asyncio.Protocol):
    def __init__(self, context):
        self.context = context

    def connection_made(self, transport):
        self.upgrading = asyncio.ensure_future(self.upgrade(transport))

    async def upgrade(self, plain):
        loop = asyncio.get_running_loop()
        self.transport = await aiofastnet.start_tls(loop, plain, self, self.context, server_side=True)

    def data_received(self, data):
        self.transport.write(data)


def ask(port):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        time.sleep(0.2)  # until the server has started TLS
        try:
            with context.wrap_socket(plain) as sock:
                sock.sendall(b"hello")
                return repr(sock.recv(100))
        except OSError as error:
            return type(error).__name__


async def main(fallback):
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: None)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    context._aiofastnet_force_fallback_ssl = fallback
    server = await loop.create_server(lambda: Echo(context), "127.0.0.1", 0)
    return await loop.run_in_executor(None, ask, server.sockets[0].getsockname()[1])


for name, run in ("asyncio", asyncio.run), ("uvloop", uvloop.run):
    for fallback in (False, True):
        print(f"{name}, {'fallback' if fallback else 'OpenSSL itself'}: {run(main(fallback))}")
PROGRAM
"$work/venv/bin/python" "$work/run.py" "$work/cert" "$work/key" | tee "$work/seen"
[ "$(grep -c "b'hello'" "$work/seen")" = 3 ] && grep -q "uvloop, fallback: Conn" "$work/seen"
