#!/usr/bin/env bash
# python-mpd2 3.1.1 on CPython: its asyncio client idles by itself, for a subsystem that its user has not named.
#
# MPD's "idle" is a command that waits for a change, and "noidle" ends it. One would guess that a client sends "idle" while its
# user iterates idle(), and the client's docstring says that it goes by which subsystems there is interest in. With no
# interest in any, it sends "idle" all the same whenever it has had no command for a moment, and names "database" as the
# presumably most quiet one (mpd/asyncio.py), to keep the connection. So the first command after a pause begins with
# "noidle". A server cannot tell this client from one with an idle() under way. The library's blocking client sends neither.
#
# Seen: what a server reads from a program that connects, waits half a second, asks for the status, and waits again.
#   asyncio: idle "database" / noidle / status / idle "database"
#   blocking: status
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check python-mpd2==3.1.1
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import socket
import threading
import time

import mpd
import mpd.asyncio


def start_server():
    listener = socket.create_server(("127.0.0.1", 0))
    commands = []

    def serve():
        peer, _ = listener.accept()
        with peer, peer.makefile("rb") as lines:
            peer.sendall(b"OK MPD 0.23.5\n")
            for line in lines:
                commands.append(line.decode().strip())
                if commands[-1] == "status":
                    peer.sendall(b"volume: 50\n")
                if not commands[-1].startswith("idle"):
                    peer.sendall(b"OK\n")

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1], commands


async def ask(port):
    client = mpd.asyncio.MPDClient()
    await client.connect("127.0.0.1", port)
    await asyncio.sleep(0.5)
    await client.status()
    await asyncio.sleep(0.5)
    client.disconnect()


port, commands = start_server()
asyncio.run(ask(port))
print("asyncio:", " / ".join(commands))

port, commands = start_server()
client = mpd.MPDClient()
client.connect("127.0.0.1", port)
time.sleep(0.5)
client.status()
time.sleep(0.5)
client.disconnect()
print("blocking:", " / ".join(commands))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(asyncio\|blocking\):/\1:/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "python-mpd2 3.1.1 behaves otherwise here"
  exit 1
fi
