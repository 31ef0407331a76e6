#!/usr/bin/env bash
# python-osc 1.10.2 on CPython: over TCP as OSC 1.1 has it (SLIP), what a server gets hangs on how packets meet in a segment.
#
# RFC 1055 ends a packet with END (0xC0). END before it is a good idea, not a must, and a receiver ignores the empty packets
# that it makes. One would guess that the server finds its packets by END. It reads until the last byte is an END, cuts what it
# has at END END, and unescapes all pieces (pythonosc/osc_tcp_server.py: recvall()). So packets with END only after them, or
# with one END between two, are read while they come one by one. Two of them in one segment raise ProtocolError: both
# are lost, and the connection is closed. python-osc's own clients write END before and after.
#
# Seen: addresses of the messages that the handlers get from two writes 0.3 s apart, and from one write.
#   END before and after: two writes ['/a', '/b'], one write ['/a', '/b']
#   END after only: two writes ['/a', '/b'], one write []
#   one END between: two writes ['/a', '/b'], one write []
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check python-osc==1.10.2
cat >"$work/run.py" <<'PROGRAM'
import socket
import threading
import time

from pythonosc.dispatcher import Dispatcher
from pythonosc.osc_tcp_server import MODE_1_1, ThreadingOSCTCPServer

END, A, B = b"\xc0", b"/a\0\0,\0\0\0", b"/b\0\0,\0\0\0"
WAYS = {
    "END before and after": (END + A + END, END + B + END),
    "END after only": (A + END, B + END),
    "one END between": (END + A + END, B + END),
}

found = []
dispatcher = Dispatcher()
dispatcher.set_default_handler(lambda address, *values: found.append(address))
server = ThreadingOSCTCPServer(("127.0.0.1", 0), dispatcher, mode=MODE_1_1)
threading.Thread(target=server.serve_forever, daemon=True).start()


def send(*writes):
    found.clear()
    with socket.create_connection(server.server_address) as client:
        for data in writes:
            client.sendall(data)
            time.sleep(0.3)
    time.sleep(0.3)
    return list(found)


for way, (first, second) in WAYS.items():
    print(f"{way}: two writes {send(first, second)}, one write {send(first + second)}")
server.shutdown()
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen"
sed -n -e 's/^#   \(END\|one\) /\1 /p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "python-osc 1.10.2 behaves otherwise here"
  exit 1
fi
