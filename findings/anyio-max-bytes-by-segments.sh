#!/usr/bin/env bash
# anyio 4.16.0 on CPython: whether a line is longer than receive_until() allows depends on how TCP cuts the stream.
#
# BufferedByteReceiveStream.receive_until(b"\n", max_bytes) raises DelimiterNotFound, by its docstring, if there is no delimiter
# within max_bytes. One would guess that a longer line raises it however it comes. The delimiter is searched for in all that has come,
# and only where it is not found is the size looked at (anyio/streams/buffered.py: receive_until()). So a line of any length
# that comes whole is returned: up to 64 KiB, the most of one receive(). A server that relies on the bound, for a field of a
# database say, sees it hold in tests by hand, and not under load. asyncio's readuntil() raises LimitOverrunError in all of these.
#
# Seen: what receive_until(b"\n", 16) gives for a line of 20 bytes, and of 60,000.
#   20 bytes in one segment: a line of 20 bytes
#   20 bytes, 10 of them first: a line of 20 bytes
#   20 bytes, 17 of them first: DelimiterNotFound
#   60000 bytes in one segment: a line of 60000 bytes
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check anyio==4.16.0
cat >"$work/run.py" <<'PROGRAM'
import socket

import anyio
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream


async def main(title, *pieces):
    done = anyio.Event()

    async def serve(stream):
        async with stream:
            for piece in pieces:
                await stream.send(piece)
                await anyio.sleep(0.3)
            await done.wait()

    async with anyio.create_task_group() as tasks:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        tasks.start_soon(listener.serve, serve)
        async with await anyio.connect_tcp("127.0.0.1", listener.extra(SocketAttribute.local_port)) as stream:
            stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
            await anyio.sleep(0.2)
            try:
                line = await BufferedByteReceiveStream(stream).receive_until(b"\n", 16)
                print(f"{title}: a line of {len(line)} bytes")
            except anyio.DelimiterNotFound:
                print(f"{title}: DelimiterNotFound")
        done.set()
        tasks.cancel_scope.cancel()


for title, *pieces in (
    ("20 bytes in one segment", b"x" * 20 + b"\n"),
    ("20 bytes, 10 of them first", b"x" * 10, b"x" * 10 + b"\n"),
    ("20 bytes, 17 of them first", b"x" * 17, b"x" * 3 + b"\n"),
    ("60000 bytes in one segment", b"x" * 60000 + b"\n"),
):
    anyio.run(main, title, *pieces)
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \([26]0\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "anyio 4.16.0 behaves otherwise here"
  exit 1
fi
