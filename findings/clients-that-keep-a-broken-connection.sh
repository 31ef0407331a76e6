#!/usr/bin/env bash
# statsd 4.0.1 (TCP), python-osc 1.10.2 (TCP) and python-escpos 3.1 on CPython: once the server has closed, every later call raises.
#
# A server that restarts, or closes idle connections, costs a client that only writes one message, as its kernel still takes that. One
# would guess that the next call raises or connects again, and that the one after it is served, as pymemcache 4.0.0 does with its
# set(), which waits for no reply. These three keep the socket they have: each call raises BrokenPipeError, for as long as the program
# runs, though the server listens. In a program that counts a metric with `client.incr()` the restart of the metrics server breaks the
# program. The author of statsd wants it so (pull request 86): the program is to call reconnect(). For the others it has to make a
# new client, or close() and open() the printer.
#
# Seen: which of the messages 0 to 5 the server gets, and which calls raise. It closes its first connection after message 0, and reads
# all that comes on later ones.
#   statsd: got [0], raised [2, 3, 4, 5]
#   python-osc: got [0], raised [2, 3, 4, 5]
#   python-escpos: got [0], raised [2, 3, 4, 5]
#   pymemcache: got [0, 3, 4, 5], raised [2]
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check statsd==4.0.1 python-osc==1.10.2 python-escpos==3.1 \
  pymemcache==4.0.0
cat >"$work/run.py" <<'PROGRAM'
import re
import socket
import threading
import time

from escpos.printer import Network
from pymemcache.client.base import Client
from pythonosc.tcp_client import SimpleTCPClient
from statsd import TCPStatsClient


def run(name, connect):
    listener = socket.create_server(("127.0.0.1", 0))
    got = []

    def read(connection, last):
        with connection:
            try:
                while data := connection.recv(65536):
                    got.append(data)
                    if last and b"message0" in b"".join(got):
                        return
            except OSError:
                pass

    def serve():
        first = True
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=read, args=(connection, first), daemon=True).start()
            first = False

    threading.Thread(target=serve, daemon=True).start()
    send = connect(listener.getsockname()[1])
    raised = []
    for number in range(6):
        try:
            send(f"message{number}")
        except (BrokenPipeError, ConnectionResetError):
            raised.append(number)
        time.sleep(0.3)
    numbers = [int(number) for number in re.findall(rb"message(\d)", b"".join(got))]
    print(f"{name}: got {numbers}, raised {raised}")


def connect_memcache(port):
    client = Client(("127.0.0.1", port))
    return lambda text: client.set(text, "value", noreply=True)


def connect_osc(port):
    client = SimpleTCPClient("127.0.0.1", port)
    return lambda text: client.send_message(f"/{text}", 1)


run("statsd", lambda port: TCPStatsClient("127.0.0.1", port).incr)
run("python-osc", connect_osc)
run("python-escpos", lambda port: Network("127.0.0.1", port).textln)
run("pymemcache", connect_memcache)
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(statsd\|python-\|pymemcache\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
