#!/usr/bin/env bash
# aiofastnet 1.2.0 on CPython: a client that leaves in mid-handshake makes the loop report an error, for every such client.
#
# Its TLS ends the handshake with the class ConnectionResetError in place of an exception (aiofastnet/ssl_transport.pyx:
# `self._on_handshake_complete(ConnectionResetError)`). _fatal_error() is quiet about an OSError, by isinstance(), which does
# not hold for the class, and so the loop's exception handler is called: by default an ERROR in the log. Health checks of a
# TLS port and port scans are such clients. asyncio's own TLS is quiet about them.
#
# Seen: for 3 clients that send 3 bytes and leave, how often the loop's exception handler is called, and with what.
#   asyncio: 0 []
#   aiofastnet: 3 ["<class 'ConnectionResetError'>"]
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, openssl, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiofastnet==1.2.0
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout "$work/key" -out "$work/cert" 2>"$work/log"
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import socket
import ssl
import sys

import aiofastnet


async def main(create_server):
    loop = asyncio.get_running_loop()
    reported = []
    loop.set_exception_handler(lambda loop, context: reported.append(repr(context.get("exception"))))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    server = await create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=context)
    for _ in range(3):
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            client.sendall(bytes([22, 3, 1]))
        await asyncio.sleep(0.2)
    return f"{len(reported)} {sorted(set(reported))}"


print("asyncio:", asyncio.run(main(lambda *args, **options: asyncio.get_running_loop().create_server(*args, **options))))
print("aiofastnet:", asyncio.run(main(lambda *args, **options: aiofastnet.create_server(asyncio.get_running_loop(), *args, **options))))
PROGRAM
"$work/venv/bin/python" "$work/run.py" "$work/cert" "$work/key" 2>/dev/null | tee "$work/seen"
grep -q "^asyncio: 0 " "$work/seen" && grep -q "^aiofastnet: 3 .*class 'ConnectionResetError'" "$work/seen"
