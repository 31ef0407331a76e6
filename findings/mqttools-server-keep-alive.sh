#!/usr/bin/env bash
# mqttools 0.50.0 on CPython: it pings at its own keep-alive, not at the one that the server's CONNACK sets, and so loses its connection.
#
# In MQTT 5 a server may answer a CONNECT with a "server keep alive", and the client must use that instead of its own (3.2.2.3.14). Servers
# that allow less than the client asks do so. They close a connection on which nothing comes for 1.5 times that long. One would
# guess that a client which speaks nothing but MQTT 5 does as it must. mqttools reads the property and does not use it (mqttools/client.py:
# the keep-alive task is made with the client's own number, 60 s by default). A client that only subscribes is closed again and again,
# by a server that works with others.
#
# Seen: when the client pings, where it wants 60 s and the server sets 2 s, and what has become of it after 5 s.
#   paho-mqtt: pings after [2, 4] s, connected
#   gmqtt: pings after [2, 4] s, connected
#   mqttools: pings after [] s, closed by the server
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check mqttools==0.50.0 gmqtt==0.8.0 paho-mqtt==2.2.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import time

import gmqtt
import mqttools
import paho.mqtt.client as paho

KEEP_ALIVE = 2


class Server:
    """A server for one client: it accepts, sets its keep-alive, answers pings, and closes what is idle for too long."""

    def __init__(self):
        self.pings = []
        self.state = "connected"

    async def serve(self, reader, writer):
        begin = time.monotonic()
        try:
            while True:
                async with asyncio.timeout(1.5 * KEEP_ALIVE):
                    kind, size = await reader.readexactly(2)
                    await reader.readexactly(size)
                if kind >> 4 == 1:
                    writer.write(bytes([0x20, 6, 0, 0, 3, 0x13, 0, KEEP_ALIVE]))
                elif kind >> 4 == 12:
                    self.pings.append(round(time.monotonic() - begin))
                    writer.write(b"\xd0\0")
        except TimeoutError:
            self.state = "closed by the server"
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        writer.close()


async def run_paho(port):
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", port, keepalive=60)
    client.loop_start()
    return client


async def run_gmqtt(port):
    client = gmqtt.Client("client")
    await client.connect("127.0.0.1", port, keepalive=60)
    return client


async def run_mqttools(port):
    client = mqttools.Client("127.0.0.1", port, client_id="client", keep_alive_s=60)
    await client.start()
    return client


async def main(name, run):
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    client = await (asyncio.to_thread(asyncio.run, run(port)) if name == "paho-mqtt" else run(port))
    await asyncio.sleep(5)
    print(f"{name}: pings after {server.pings} s, {server.state}", flush=True)
    if name == "paho-mqtt":
        await asyncio.to_thread(client.loop_stop)


asyncio.run(main("paho-mqtt", run_paho))
asyncio.run(main("gmqtt", run_gmqtt))
asyncio.run(main("mqttools", run_mqttools))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(paho-mqtt\|gmqtt\|mqttools\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
