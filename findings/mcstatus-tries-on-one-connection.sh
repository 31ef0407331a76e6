#!/usr/bin/env bash
# mcstatus 14.2.0 on CPython: status(tries=3) tries three times on one connection, also after the server has closed it.
#
# One would guess that a retry opens a new connection, as a server that closes one without a reply (it restarts, or sheds load) gives
# the next one what was asked. mcstatus connects first and tries then (mcstatus/server.py: status(), _retry_status()): the second and third
# try go to a socket that the server has closed, and fail at once. To a server that is slow to answer, each try sends the handshake
# and the request again on the same connection, where the protocol has one handshake, at the start: a server that goes by the state
# of the connection takes the second one for a malformed request. The asynchronous calls do the same.
#
# Seen: what status() gives and what the server has received, where it serves each connection but the first, on which it does what is named.
#   it answers: online 3, connections 1, handshakes on the first 1
#   it closes: OSError, connections 1, handshakes on the first 1
#   it is silent: TimeoutError, connections 1, handshakes on the first 3
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check mcstatus==14.2.0
cat >"$work/run.py" <<'PROGRAM'
import itertools
import json
import socket
import threading

from mcstatus import JavaServer

TEXT = json.dumps(
    {"version": {"name": "1", "protocol": 47}, "players": {"max": 9, "online": 3}, "description": "d"}
).encode()
REPLY = bytes([len(TEXT) + 2, 0, len(TEXT)]) + TEXT
assert len(REPLY) < 128


def status(first):
    listener = socket.create_server(("127.0.0.1", 0))
    seen = []

    def talk(connection, what):
        handshakes = 0
        with connection, connection.makefile("rb") as file:
            try:
                while length := file.read(1):
                    packet = file.read(length[0])
                    if len(packet) > 1:
                        handshakes += 1
                        seen.append(handshakes)
                    elif what == "answers":
                        connection.sendall(REPLY)
                    elif what == "closes":
                        return
            except OSError:
                pass

    def run():
        for number in itertools.count():
            connection, _ = listener.accept()
            threading.Thread(target=talk, args=(connection, "answers" if number else first), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        result = f"online {JavaServer('127.0.0.1', listener.getsockname()[1], timeout=1).status(tries=3).players.online}"
    except TimeoutError:
        result = "TimeoutError"
    except OSError:
        result = "OSError"
    return f"{result}, connections {seen.count(1)}, handshakes on the first {max(seen)}"


print("it answers:", status("answers"))
print("it closes:", status("closes"))
print("it is silent:", status("silent"))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   it/it/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "mcstatus 14.2.0 behaves otherwise here"
  exit 1
fi
