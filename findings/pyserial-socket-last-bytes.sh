#!/usr/bin/env bash
# pyserial 3.5 on CPython: with a socket:// URL the last bytes before the server closes are lost, if a read asks for more.
#
# socket://HOST:PORT is for device servers that pass a serial line on. read(size) is documented to return fewer bytes at a timeout, so
# one would guess that at the end of the stream it returns what has come, and an error only after it. It collects what it gets
# in a local variable, and raises SerialException at the end of the stream (serial/urlhandler/protocol_socket.py: read()). The
# bytes that it had are gone: the next read raises too. Without the close the same read returns them at its timeout. readline()
# goes by read(1), and its caller loses a last line without a line end. So a server that answers and closes has to be read with the
# exact length.
#
# Seen: what two reads give where the server answers "OK done".
#   read(7), the server closes: b'OK done', SerialException
#   read(100), the server closes: SerialException, SerialException
#   read(100), the server waits: b'OK done', b''
#   readline(), the server closes: SerialException, SerialException
#   readline(), the server waits: b'OK done', b''
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyserial==3.5
cat >"$work/run.py" <<'PROGRAM'
import socketserver
import threading

import serial


def serve(waits):
    class Device(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            self.request.sendall(b"OK done")
            if waits:
                self.request.recv(1)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Device)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def twice(title, waits, read):
    port = serial.serial_for_url(f"socket://127.0.0.1:{serve(waits)}", timeout=0.5)
    port.write(b"?")
    got = []
    for _ in range(2):
        try:
            got.append(repr(read(port)))
        except serial.SerialException:
            got.append("SerialException")
    port.close()
    print(f"{title}, the server {'waits' if waits else 'closes'}: {', '.join(got)}")


twice("read(7)", False, lambda port: port.read(7))
for waits in (False, True):
    twice("read(100)", waits, lambda port: port.read(100))
for waits in (False, True):
    twice("readline()", waits, lambda port: port.readline())
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   read/read/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "pyserial 3.5 behaves otherwise here"
  exit 1
fi
