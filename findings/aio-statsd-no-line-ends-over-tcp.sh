#!/usr/bin/env bash
# aio-statsd 0.2.9 on CPython: over TCP it sends metrics with nothing between them.
#
# Carbon and Telegraf read lines. Over UDP a datagram ends a metric, with a line end or without. aio-statsd sends over TCP what it sends
# over UDP, without a line end (aio_statsd/connection.py: _sendto()). A server that reads lines gets one line at the end of the
# connection, or waits for it until its limit: it cannot tell the end of one value or timestamp from the start of the next name.
# A server that takes what one read gives for one metric seems to work, until two come together. graphyte 1.7.1 ends lines.
#
# Seen: all that a TCP server gets for three metrics.
#   aio-statsd, graphite: b'm0 0 1700000000m1 1 1700000000m2 2 1700000000'
#   aio-statsd, statsd for telegraf: b'm0:1|cm1:1|cm2:1|c'
#   graphyte: b'm0 0 1700000000\nm1 1 1700000000\nm2 2 1700000000\n'
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aio-statsd==0.2.9 graphyte==1.7.1
cat >"$work/run.py" <<'PROGRAM'
import asyncio

import aio_statsd
import graphyte

TIME = 1700000000


async def collect(send):
    got = []
    enough = asyncio.Event()

    async def serve(reader, writer):
        while data := await reader.read(65536):
            got.append(data)
            if b"m2" in b"".join(got):
                enough.set()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        await send(server.sockets[0].getsockname()[1])
        await asyncio.wait_for(enough.wait(), 10)
        await asyncio.sleep(0.3)
    return b"".join(got)


async def send_graphite(port):
    client = aio_statsd.GraphiteClient("127.0.0.1", port, protocol=aio_statsd.ProtocolFlag.tcp)
    await client.connect()
    for number in range(3):
        client.send_graphite(f"m{number}", number, TIME)
    await client.close()


async def send_statsd(port):
    client = aio_statsd.TelegrafStatsdClient("127.0.0.1", port, protocol=aio_statsd.ProtocolFlag.tcp)
    await client.connect()
    for number in range(3):
        client.counter(f"m{number}", 1)
    await client.close()


async def send_graphyte(port):
    sender = graphyte.Sender("127.0.0.1", port)
    for number in range(3):
        await asyncio.to_thread(sender.send, f"m{number}", number, TIME)


print("aio-statsd, graphite:", asyncio.run(collect(send_graphite)))
print("aio-statsd, statsd for telegraf:", asyncio.run(collect(send_statsd)))
print("graphyte:", asyncio.run(collect(send_graphyte)))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(aio-statsd\|graphyte\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aio-statsd 0.2.9 or graphyte 1.7.1 behaves otherwise here"
  exit 1
fi
