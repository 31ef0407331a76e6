#!/usr/bin/env bash
# gmqtt 0.8.0 on CPython: after a lost connection it drops the QoS 1 messages that wait, or sends them again without the DUP flag.
#
# One would guess that a client which connects again by itself then sends what has QoS 1 and no PUBACK, with the DUP flag where it is
# sent once more (3.3.1.1 of MQTT 3.1.1). It does so only for a server that says "session present" (gmqtt/mqtt/handler.py:
# the CONNACK). For any other it empties its store. For a message under way MQTT 5 wants that, but the store also has what the program
# has published while there was no connection, and what was never sent. With the default clean_session=True a server has no session
# to keep, and one that restarts has often lost it. No call raises, and the drop is not logged. Where it does send them again, DUP is 0.
# Its second CONNECT has clean session 0 whatever the program wants. paho-mqtt 2.2.0 sends them again also without a session, with DUP.
#
# Seen: what the server gets on the second connection. It has closed the first one on "one" without a PUBACK; "two" is published
# while there is no connection, "three" on the second.
#   gmqtt, clean_session=True, no session: CONNECT clean=0, three dup=0
#   gmqtt, clean_session=False, session present: CONNECT clean=0, one dup=0, two dup=0, three dup=0
#   gmqtt, clean_session=False, session lost: CONNECT clean=0, three dup=0
#   paho, clean_session=True, no session: CONNECT clean=1, one dup=1, two dup=0, three dup=0
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check gmqtt==0.8.0 paho-mqtt==2.2.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import socket
import threading
import time

import gmqtt
from paho.mqtt import client as paho


class Server:
    def __init__(self, session_present):
        self.session_present = session_present
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.got = []
        self.closed = threading.Event()
        self.second = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        for number in (1, 2):
            connection, _ = self.listener.accept()
            with connection, connection.makefile("rb") as file:
                try:
                    self.talk(connection, file, number)
                except OSError:
                    pass
            self.closed.set()

    def talk(self, connection, file, number):
        while first := file.read(1):
            packet = file.read(file.read(1)[0])
            if first[0] >> 4 == 1:
                self.note(number, f"CONNECT clean={packet[7] >> 1 & 1}")
                connection.sendall(bytes([0x20, 2, self.session_present and number == 2, 0]))
                if number == 2:
                    self.second.set()
            elif first[0] >> 4 == 3:
                if number == 1:
                    return
                self.note(number, f"{packet[5:].decode()} dup={first[0] >> 3 & 1}")
                connection.sendall(b"\x40\x02" + packet[3:5])

    def note(self, number, what):
        if number == 2:
            self.got.append(what)

    def wait(self, event):
        if not event.wait(15):
            raise SystemExit("the client did not connect again")
        time.sleep(0.3)


async def with_gmqtt(clean_session, session_present):
    server = Server(session_present)
    client = gmqtt.Client("one", clean_session=clean_session)
    client.set_config({"reconnect_delay": 1})
    await client.connect("127.0.0.1", server.port, version=gmqtt.constants.MQTTv311)
    client.publish("t", "one", qos=1)
    await asyncio.to_thread(server.wait, server.closed)
    client.publish("t", "two", qos=1)
    await asyncio.to_thread(server.wait, server.second)
    client.publish("t", "three", qos=1)
    await asyncio.sleep(0.5)
    await client.disconnect()
    return ", ".join(server.got)


def with_paho():
    server = Server(False)
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "one")
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    client.publish("t", "one", qos=1)
    server.wait(server.closed)
    client.publish("t", "two", qos=1)
    server.wait(server.second)
    client.publish("t", "three", qos=1)
    time.sleep(0.5)
    client.disconnect()
    client.loop_stop()
    return ", ".join(server.got)


print("gmqtt, clean_session=True, no session:", asyncio.run(with_gmqtt(True, False)))
print("gmqtt, clean_session=False, session present:", asyncio.run(with_gmqtt(False, True)))
print("gmqtt, clean_session=False, session lost:", asyncio.run(with_gmqtt(False, False)))
print("paho, clean_session=True, no session:", with_paho())
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(gmqtt\|paho\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "gmqtt 0.8.0 or paho-mqtt 2.2.0 behaves otherwise here"
  exit 1
fi
