#!/usr/bin/env bash
# aio-statsd 0.2.9 on CPython: one datagram sent while the UDP server restarts closes the client, and every later call raises.
#
# Metrics go over UDP so that a program does not depend on the server of its metrics. A datagram to a port that nothing listens on
# is refused by an ICMP message, which Linux reports to a connected socket. One would guess that this costs no more than the
# datagrams of that time. aio-statsd connects its socket and takes the report for the end of the connection (aio_statsd/
# transport_layer_protocol.py: error_received()): its task ends, and from then on counter() raises ConnectionError, in the program that
# wants to count something, until that makes a new client. statsd does not connect its socket and hears of nothing. datadog
# drops the datagram that meets the report, opens a new socket and goes on.
#
# Seen: which of the messages 0 to 7 the server gets, and which calls raise. It is down while 2 and 3 are sent.
#   aio-statsd: got [0, 1], raised [3, 4, 5, 6, 7]
#   statsd: got [0, 1, 4, 5, 6, 7], raised []
#   datadog: got [0, 1, 4, 5, 6, 7], raised []
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aio-statsd==0.2.9 statsd==4.0.1 datadog==0.56.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import logging
import re
import socket

import aio_statsd
import statsd
from datadog.dogstatsd import DogStatsd

logging.disable(logging.CRITICAL)


def bind(port=0):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", port))
    server.setblocking(False)
    return server


async def run(name, connect):
    server = bind()
    address = server.getsockname()
    count = await connect(address[1])
    got = []
    raised = []
    for number in range(8):
        if number == 2:
            server.close()
        elif number == 4:
            server = bind(address[1])
        try:
            count(f"message{number}")
        except ConnectionError:
            raised.append(number)
        await asyncio.sleep(0.3)
        try:
            while number not in (2, 3):
                got += [int(digit) for digit in re.findall(rb"message(\d)", server.recv(65536))]
        except BlockingIOError:
            pass
    server.close()
    print(f"{name}: got {got}, raised {raised}")


async def connect_aio_statsd(port):
    client = aio_statsd.StatsdClient("127.0.0.1", port)
    await client.connect()
    return lambda text: client.counter(text, 1)


async def connect_statsd(port):
    return statsd.StatsClient("127.0.0.1", port).incr


async def connect_datadog(port):
    return DogStatsd("127.0.0.1", port, disable_buffering=True, disable_telemetry=True).increment


async def main():
    await run("aio-statsd", connect_aio_statsd)
    await run("statsd", connect_statsd)
    await run("datadog", connect_datadog)


asyncio.run(main())
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(aio-statsd\|statsd\|datadog\):/\1:/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
