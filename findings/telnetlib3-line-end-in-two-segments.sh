#!/usr/bin/env bash
# telnetlib3 5.0.1 on CPython: readline() gives one line or two, as CR and LF come in one segment or in two.
#
# Telnet ends a line with CR LF. One would guess that readline() gives the same lines however the stream is cut, as asyncio's does.
# Its docstring says that CR ends no line unless LF or NUL follows, and in a table that CR alone ends one. It decides by what has
# come so far (telnetlib3/stream_reader.py: readline()). If LF comes in the next segment, the line ends with "\r", and a line "\n"
# follows, which is empty to a program that strips them. A menu that takes an empty line as an answer gets an answer too many.
#
# Seen: what readline() gives a client for "name: x\r\n", then "end\r\n" half a second later.
#   CR LF in one segment: ['name: x\r\n', 'end\r\n']
#   CR, then LF: ['name: x\r', '\n', 'end\r\n']
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check telnetlib3==5.0.1
cat >"$work/run.py" <<'PROGRAM'
import asyncio

import telnetlib3


async def read_lines(*pieces):
    async def serve(reader, writer):
        for data in (*pieces, b"end\r\n"):
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.5)
        writer.close()
        done.set()

    done = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await telnetlib3.open_connection(*server.sockets[0].getsockname())
    lines = []
    while not lines or "end" not in lines[-1]:
        lines.append(await reader.readline())
    await done.wait()
    writer.close()
    server.close()
    return lines


print("CR LF in one segment:", asyncio.run(read_lines(b"name: x\r\n")))
print("CR, then LF:", asyncio.run(read_lines(b"name: x\r", b"\n")))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   CR/CR/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "telnetlib3 5.0.1 behaves otherwise here"
  exit 1
fi
