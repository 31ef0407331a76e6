#!/usr/bin/env bash
# aiohttp 3.14.5 on CPython: its server does not answer a client that has closed its sending side, as `nc -N` does.
#
# A client that has sent its whole request may end its stream and read on: TCP has two directions, and with `Connection: close` no
# more can follow anyway. aiohttp's eof_received() does nothing (aiohttp/web_protocol.py), and so returns None, at which asyncio
# closes the transport: a request that is being answered then, or has come just before, gets no byte of a reply.
#
# Seen: how many of one or three requests are answered.
#   http.server, the client waits: 1 of 1
#   http.server, the client half-closes: 1 of 1
#   aiohttp, the client waits: 1 of 1
#   aiohttp, the client half-closes: 0 of 1
#   aiohttp, the client half-closes: 0 of 3
#   aiohttp, the client half-closes while the handler works: 0 of 1
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiohttp==3.14.5
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import http.server
import threading

from aiohttp import web

REQUEST = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_REQUEST = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments):
        pass


async def hello(request):
    return web.Response(text="ok")


async def slow(request):
    await asyncio.sleep(0.5)
    return web.Response(text="ok")


async def ask(server, port, how, count=1, path=b"/", half_close_after=None):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST % path * (count - 1) + LAST_REQUEST % path)
    if half_close_after is not None:
        await asyncio.sleep(half_close_after)
        writer.write_eof()
    async with asyncio.timeout(10):
        received = await reader.read()
    writer.close()
    print(f"{server}, the client {how}: {received.count(b'HTTP/1.1 200 OK')} of {count}")


async def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    await ask("http.server", server.server_port, "waits")
    await ask("http.server", server.server_port, "half-closes", half_close_after=0)
    server.shutdown()
    server.server_close()

    application = web.Application()
    application.router.add_get("/", hello)
    application.router.add_get("/slow", slow)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    await ask("aiohttp", port, "waits")
    await ask("aiohttp", port, "half-closes", half_close_after=0)
    await ask("aiohttp", port, "half-closes", count=3, half_close_after=0)
    await ask("aiohttp", port, "half-closes while the handler works", path=b"/slow", half_close_after=0.2)
    await runner.cleanup()


asyncio.run(main())
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(http.server\|aiohttp\),/\1,/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aiohttp 3.14.5 behaves otherwise here"
  exit 1
fi
