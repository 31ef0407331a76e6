#!/usr/bin/env bash
# stompman 3.16.0 on CPython: to a server that wants no heart-beats it sends them without a pause.
#
# STOMP 1.2 has both sides say how often they can send and want to receive heart-beats. A second number of 0 says that the
# server wants none, so one would guess that a client sends it none. stompman pauses for as many milliseconds as that second
# number says (stompman/connection_manager.py: _send_heartbeats_forever()), so with 0 it writes "\n" again and again. Its own
# number, 1000 by default, plays no part. A server that answers "heart-beat:0,0" reads thousands of empty lines from a client
# that has nothing to say. With "0,1000" it reads one a second. The README says that heart-beats are required, not this.
#
# Seen: heart-beats that the server reads in the three seconds after CONNECTED.
#   heart-beat:0,1000: a few
#   heart-beat:0,0: over 1000
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check stompman==3.16.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio

import stompman


async def main(wish):
    beats = 0

    async def serve(reader, writer):
        nonlocal beats
        await reader.readuntil(b"\0")
        writer.write(b"CONNECTED\nversion:1.2\nheart-beat:%s\n\n\0" % wish)
        while data := await reader.read(65536):
            if b"DISCONNECT" in data:
                break
            beats += data.count(b"\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    login = stompman.ConnectionParameters("127.0.0.1", port, "user", "word")
    async with stompman.Client([login], disconnect_confirmation_timeout=1):
        await asyncio.sleep(3)
        return beats


for wish in (b"0,1000", b"0,0"):
    beats = asyncio.run(main(wish))
    print(f"heart-beat:{wish.decode()}: {'a few' if 1 <= beats <= 5 else 'over 1000' if beats > 1000 else beats}")
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   heart-beat/heart-beat/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "stompman 3.16.0 behaves otherwise here"
  exit 1
fi
