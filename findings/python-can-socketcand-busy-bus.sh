#!/usr/bin/env bash
# python-can 4.6.1 on CPython: its socketcand client cannot connect where the first frame comes with the reply to "rawmode".
#
# A socketcand server answers "< rawmode >" with "< ok >" and sends the frames of the bus from then on. On a busy bus the first one comes
# at once, and TCP can give both in one segment. The client reads frames from a stream, over any segments; so one would guess that
# it reads the replies before them likewise. It takes what one recv() gives for the whole reply (can/interfaces/socketcand/socketcand.py:
# _expect_msg()): with a frame behind "< ok >", or with a reply that TCP cuts, opening the bus raises CanError. A server
# for it has to wait before the first frame. The client of SavvyCAN had the same fault (its pull request 495).
#
# Seen: what the client makes of "< ok >" and two frames, where the server sends them so.
#   "< ok >", after 0.3 s the frames: 0x123 0x124
#   "< ok >", after 0.3 s the frames byte by byte: 0x123 0x124
#   "< ok >" and the frames in one segment: CanError
#   "< o" and "k >" in two segments, after 0.3 s the frames: CanError
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check python-can==4.6.1
cat >"$work/run.py" <<'PROGRAM'
import logging
import socket
import threading
import time

import can

logging.disable(logging.CRITICAL)
FRAMES = b"< frame 123 23.424242 0102 >< frame 124 23.424343 03 >"


def receive(*segments):
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(b"< hi >")
            try:
                connection.recv(65536)
                connection.sendall(b"< ok >")
                connection.recv(65536)
                for pause, segment in segments:
                    time.sleep(pause)
                    connection.sendall(segment)
                connection.recv(65536)
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        with can.Bus(interface="socketcand", host="127.0.0.1", port=listener.getsockname()[1], channel="can0") as bus:
            return " ".join(hex(message.arbitration_id) for message in (bus.recv(5), bus.recv(5)))
    except can.CanError as error:
        return type(error).__name__


print('"< ok >", after 0.3 s the frames:', receive((0, b"< ok >"), (0.3, FRAMES)))
single = [(0.005, bytes([byte])) for byte in FRAMES]
print('"< ok >", after 0.3 s the frames byte by byte:', receive((0, b"< ok >"), (0.3, b""), *single))
print('"< ok >" and the frames in one segment:', receive((0, b"< ok >" + FRAMES)))
print('"< o" and "k >" in two segments, after 0.3 s the frames:', receive((0, b"< o"), (0.3, b"k >"), (0.3, FRAMES)))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   "/"/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "python-can 4.6.1 behaves otherwise here"
  exit 1
fi
