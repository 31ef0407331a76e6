#!/usr/bin/env bash
# nats-py 2.16.0 on CPython: it hangs up on a server that writes its operations in lower case.
#
# The NATS protocol's documentation says that names of operations are case-insensitive, and that fields may be parted by several
# spaces or tabs. One would guess that a client takes "msg" like "MSG". nats-py takes tabs and several spaces, but only capital letters
# (nats/protocol/parser.py: MSG_RE, PING_RE and the others). Anything else is a protocol error to it: it closes the connection and
# connects again, for ever. It works with nats-server, which writes capitals. A server of one's own has to do the same.
#
# Seen: what a subscriber gets, and how often it connects, within three seconds.
#   MSG: [b'hi'], once
#   MSG with tabs: [b'hi'], once
#   msg: [], again and again
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check nats-py==2.16.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio

import nats


async def main(operation):
    connected, found = 0, []

    async def serve(reader, writer):
        nonlocal connected
        connected += 1
        writer.write(b'INFO {"server_id":"finding","version":"2.10.0","max_payload":1000}\r\n')
        try:
            while line := await reader.readline():
                if line == b"PING\r\n":
                    writer.write(b"PONG\r\n")
                elif line.startswith(b"SUB label"):
                    writer.write(operation + b"\r\nhi\r\n")
        except ConnectionError:
            pass
        writer.close()

    async def keep(message):
        found.append(message.data)

    async def ignore(error):
        pass

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = await nats.connect(f"nats://127.0.0.1:{port}", reconnect_time_wait=0.2, max_reconnect_attempts=-1, error_cb=ignore)
    await client.subscribe("label", cb=keep)
    await asyncio.sleep(3)
    result = f"{found}, {'once' if connected == 1 else 'again and again' if connected > 2 else connected}"
    await client.close()
    return result


for name, operation in {"MSG": b"MSG label 1 2", "MSG with tabs": b"MSG\tlabel\t1\t2", "msg": b"msg label 1 2"}.items():
    print(f"{name}: {asyncio.run(main(operation))}")
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen"
sed -n -e 's/^#   \(MSG\|msg\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "nats-py 2.16.0 behaves otherwise here"
  exit 1
fi
