#!/usr/bin/env bash
# fluent-logger 0.11.1 on CPython: when the server has closed an idle connection, emit() returns False, and the record is sent.
#
# One would guess either that emit() connects again and returns True, or that the record is lost with False. It sees the close,
# drops the connection, keeps the record and returns False, though the server listens (fluent/sender.py: _send_internal()). It
# does not try again by itself: the record waits for the next emit(), which connects and sends both, or for close(). A program
# that sends what got False once more has it at the server twice. A server that closes idle connections gets the first record
# after an idle time as late as the second.
#
# Seen: what emit() returns, and the records the server has got half a second later. It closes its first connection when
# that has been idle for 0.2 s after one record.
#   emit 0: True, server has [0]
#   emit 1: False, server has [0]
#   emit 2: True, server has [0, 1, 2]
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check fluent-logger==0.11.1 msgpack==1.2.4
cat >"$work/run.py" <<'PROGRAM'
import socket
import threading
import time

import msgpack
from fluent.sender import FluentSender

got = []


def serve(listener):
    connections = 0
    while True:
        peer, _ = listener.accept()
        connections += 1
        unpacker = msgpack.Unpacker()
        while data := peer.recv(65536):
            unpacker.feed(data)
            got.extend(record["number"] for _, _, record in unpacker)
            if connections == 1:
                time.sleep(0.2)  # it is idle for so long
                break
        peer.close()


listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, args=(listener,), daemon=True).start()
sender = FluentSender("app", host="127.0.0.1", port=listener.getsockname()[1])
for number in range(3):
    result = sender.emit("label", {"number": number})
    time.sleep(0.5)
    print(f"emit {number}: {result}, server has {got}")
sender.close()
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   emit/emit/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "fluent-logger 0.11.1 behaves otherwise here"
  exit 1
fi
