#!/usr/bin/env bash
# aio_statsd 0.2.9 on CPython: a sample rate of 0.1 sends nine of ten metrics, marked as one of ten; so statsd counts nine times as much.
#
# `name:1|c|@0.1` tells statsd that this is one of ten, and statsd multiplies by ten. The client sends a metric if `random() >
# sample_rate` (aio_statsd/client.py, send_statsd()), where it would have to be `<`. Also, increment() and decrement() change gauges,
# not counters, and gauge() with a value below zero is a decrement to statsd, which knows a sign for a difference.
#
# Seen: of 2,000 metrics how many come, in hundreds, what statsd takes them for, and two datagrams as they are.
#   rate 0.9: 2 hundred come, taken for 2 hundred
#   rate 0.1: 18 hundred come, taken for 180 hundred
#   increment("key", 1): b'key:+1|g'
#   gauge("key", -5): b'key:-5|g'
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aio_statsd==0.2.9
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import random
import socket

from aio_statsd import StatsdClient

COUNT, PIECE = 2000, 50  # few at once, so that a socket has room for them


async def main():
    loop = asyncio.get_running_loop()
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)

        async def receive(seconds):
            datagrams = []
            try:
                async with asyncio.timeout(seconds):
                    while True:
                        datagrams.append(await loop.sock_recv(receiver, 1000))
            except TimeoutError:
                return datagrams

        async with StatsdClient("127.0.0.1", receiver.getsockname()[1]) as client:
            for rate in (0.9, 0.1):
                random.seed(1)
                came = []
                for _ in range(COUNT // PIECE):
                    for _ in range(PIECE):
                        client.counter("key", 1, sample_rate=rate)
                    came += await receive(0.15)
                assert set(came) <= {b"key:1|c|@%.1f" % rate}
                print(f"rate {rate}: {len(came) / 100:.0f} hundred come, taken for {len(came) / rate / 100:.0f} hundred")
            client.increment("key", 1)
            print('increment("key", 1):', *await receive(0.3))
            client.gauge("key", -5)
            print('gauge("key", -5):', *await receive(0.3))


asyncio.run(main())
PROGRAM
timeout 120 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(rate\|increment\|gauge\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aio_statsd 0.2.9 behaves otherwise here"
  exit 1
fi
