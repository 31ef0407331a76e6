#!/usr/bin/env bash
# aio-mc-rcon 3.5.0 on CPython: after a reply of more than 4,096 bytes every command gets the reply to the one before.
#
# Minecraft's server cuts a long reply into packets of 4,096 bytes, all with the id of the request. That a client gives only the first
# of them is common, as the protocol does not mark the last one. One would guess that it then drops the others, which it can tell by
# their id: the client makes a random one for each request, and returns it with the reply. It compares it with nothing but -1
# (aiomcrcon/client.py: _send_msg()). So the next command gets the rest of the reply before, and so on until close(). A list of
# commands or of players is long enough. Nothing raises.
#
# Seen: the first letters of what four commands give, where the server answers "list" with 4,200 bytes.
#   seed, time, day, save: seed time day save
#   seed, list, time, day: seed list-1 list-2 time
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aio-mc-rcon==3.5.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import struct

from aiomcrcon import Client


async def serve(reader, writer):
    def send(number, kind, text):
        writer.write(struct.pack("<iii", len(text) + 10, number, kind) + text + b"\0\0")

    try:
        while True:
            size, number, kind = struct.unpack("<iii", await reader.readexactly(12))
            command = (await reader.readexactly(size - 8))[:-2]
            if kind == 3:
                send(number, 2, b"")
            elif command == b"list":
                send(number, 0, b"list-1 ".ljust(4096, b"."))
                send(number, 0, b"list-2 ".ljust(104, b"."))
            else:
                send(number, 0, command + b" done")
    except (asyncio.IncompleteReadError, asyncio.CancelledError):
        writer.close()


async def ask(*commands):
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.sockets[0].getsockname()[1], "password")
    await client.connect()
    replies = [(await client.send_cmd(command))[0] for command in commands]
    await client.close()
    server.close()
    print(", ".join(commands) + ":", *(reply.split()[0] for reply in replies))


asyncio.run(ask("seed", "time", "day", "save"))
asyncio.run(ask("seed", "list", "time", "day"))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(seed\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aio-mc-rcon 3.5.0 behaves otherwise here"
  exit 1
fi
