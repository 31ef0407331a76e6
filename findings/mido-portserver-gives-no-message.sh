#!/usr/bin/env bash
# mido 1.3.3 on CPython: a loop over a PortServer, its documentation's first example of a server, never gets a message.
#
# Socket ports carry MIDI over TCP. "for message in PortServer(host, port)" is to give what the clients send, and poll() what is there,
# or None. The server takes in a client and its messages, but asks the ports below it to wait in every case, which they do in a loop that has no
# end (mido/sockets.py: PortServer._receive() drops its argument `block`; mido/ports.py: MultiPort._receive() puts all that this
# loop gives into a list first). So neither ever returns, with messages or without, and no error shows. accept() works: it gives
# a port for one client, and its messages can be read.
#
# Seen: the notes that a server gets within two seconds, where a client has sent 60, 61 and 62.
#   for message in server: []
#   server.poll(): []
#   for message in server.accept(): [60, 61, 62]
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check mido==1.3.3
cat >"$work/run.py" <<'PROGRAM'
import os
import socket
import threading
import time

from mido import Message
from mido.sockets import PortServer, connect


def loop(server):
    for message in server:
        yield message.note


def poll(server):
    while True:
        if message := server.poll():
            yield message.note
        time.sleep(0.01)


def accept(server):
    return loop(server.accept())


def notes_by(read):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = PortServer("127.0.0.1", port)
    client = connect("127.0.0.1", port)
    for note in 60, 61, 62:
        client.send(Message("note_on", note=note))
    notes = []
    threading.Thread(target=lambda: [notes.append(note) for note in read(server)], daemon=True).start()
    time.sleep(2)
    return notes


print("for message in server:", notes_by(loop))
print("server.poll():", notes_by(poll))
print("for message in server.accept():", notes_by(accept), flush=True)
os._exit(0)
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(for\|server\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "mido 1.3.3 behaves otherwise here"
  exit 1
fi
