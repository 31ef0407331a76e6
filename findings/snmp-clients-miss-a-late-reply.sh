#!/usr/bin/env bash
# puresnmp 2.0.1 and pysnmp 7.1.30 on CPython: an agent that takes longer than one time-out is never heard, however often they ask.
#
# A client that sends a request again after its time-out waits for the reply longer in all: one would guess that the reply to the first
# request, which comes after the second was sent, is taken. puresnmp sends the same bytes again, but from a new socket, and closes the
# old one (puresnmp/transport.py: send_udp()): the reply comes to a port that is not open any more, and an agent that looks for
# repeated requests sees other clients. Its `retries=3` means three requests in all. pysnmp stays on its port and takes a new
# request-id for each request: it drops the reply as not asked for. Both make the agent work once for each attempt, and fail.
#
# Seen: what get() gives with a time-out of 1 s and three retries, where the agent answers each request after a delay; and what the
# agent has received.
#   puresnmp, 0.2 s: 7 after 1 requests, 1 ports, 1 request-ids
#   puresnmp, 1.5 s: Timeout after 3 requests, 3 ports, 1 request-ids
#   pysnmp, 0.2 s: 7 after 1 requests, 1 ports, 1 request-ids
#   pysnmp, 1.5 s: RequestTimedOut after 4 requests, 1 ports, 4 request-ids
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check puresnmp==2.0.1 pysnmp==7.1.30
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import socket
import threading

import puresnmp
from pysnmp.hlapi.v3arch import asyncio as pysnmp

OID = "1.3.6.1.2.1.1.7.0"


class Agent:
    def __init__(self, delay):
        self.delay = delay
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.seen = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            request, client = self.socket.recvfrom(65536)
            start = request.index(b"\xa0")
            self.seen.append((client[1], request[start + 4 : start + 4 + request[start + 3]]))
            # The reply is the request with another type, and with the INTEGER 7 for the NULL: one byte more in each length.
            reply = bytearray(request[:-16] + b"\x30\x0f\x30\x0d" + request[-12:-2] + b"\x02\x01\x07")
            reply[1] += 1
            reply[start] = 0xA2
            reply[start + 1] += 1
            timer = threading.Timer(self.delay, self.socket.sendto, (reply, client))
            timer.daemon = True
            timer.start()

    def __str__(self):
        ports, numbers = ({pair[side] for pair in self.seen} for side in (0, 1))
        return f"after {len(self.seen)} requests, {len(ports)} ports, {len(numbers)} request-ids"


async def with_puresnmp(agent):
    client = puresnmp.PyWrapper(puresnmp.Client("127.0.0.1", puresnmp.V2C("public"), port=agent.port))
    try:
        with client.client.reconfigure(timeout=1, retries=3):
            return await client.get(OID)
    except Exception as error:
        return type(error).__name__


async def with_pysnmp(agent):
    engine = pysnmp.SnmpEngine()
    error, _, _, values = await pysnmp.get_cmd(
        engine,
        pysnmp.CommunityData("public"),
        await pysnmp.UdpTransportTarget.create(("127.0.0.1", agent.port), timeout=1, retries=3),
        pysnmp.ContextData(),
        pysnmp.ObjectType(pysnmp.ObjectIdentity(OID)),
    )
    engine.close_dispatcher()
    return type(error).__name__ if error else int(values[0][1])


for name, get in (("puresnmp", with_puresnmp), ("pysnmp", with_pysnmp)):
    for delay in (0.2, 1.5):
        agent = Agent(delay)
        print(f"{name}, {delay} s: {asyncio.run(get(agent))} {agent}")
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   p/p/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "puresnmp 2.0.1 or pysnmp 7.1.30 behaves otherwise here"
  exit 1
fi
