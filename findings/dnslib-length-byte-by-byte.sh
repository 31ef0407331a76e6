#!/usr/bin/env bash
# dnslib 0.9.26 on CPython: over TCP its client raises, and its server gives no answer, if the first read has one byte.
#
# DNS over TCP puts a length of two bytes before a message, and TCP may deliver the first of them alone. The client and the server
# read once and take the length from what has come (dnslib/dns.py, DNSRecord.send(): `length =
# struct.unpack("!H",bytes(response[:2]))[0]`; dnslib/server.py calls it "Request Truncated", and closes). From the third byte on both
# read until the message is whole, so only this one place to cut is wrong.
#
# Seen: what the client makes of a reply that comes in two pieces, and whether the server answers a query that does.
#   client, cut after  1 byte:  error: unpack requires a buffer of 2 bytes
#   client, cut after  2 bytes: 127.0.0.1
#   client, cut after 20 bytes: 127.0.0.1
#   server, cut after  1 byte:  no answer
#   server, cut after  2 bytes: 127.0.0.1
#   server, cut after 20 bytes: 127.0.0.1
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check dnslib==0.9.26
cat >"$work/run.py" <<'PROGRAM'
import socket
import struct
import threading
import time

from dnslib import RR, DNSRecord
from dnslib.server import BaseResolver, DNSServer


class Fixed(BaseResolver):
    def resolve(self, request, handler):
        reply = request.reply()
        reply.add_answer(*RR.fromZone("www.example. 60 A 127.0.0.1"))
        return reply


class Quiet:
    def __getattr__(self, name):
        return lambda *arguments: None


def send_in_two(sock, message, cut):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    message = struct.pack("!H", len(message)) + message
    sock.sendall(message[:cut])
    time.sleep(0.2)
    sock.sendall(message[cut:])


def answer_once(listener, cut):
    sock, _ = listener.accept()
    with sock:
        query = DNSRecord.parse(sock.recv(1000)[2:])
        try:
            send_in_two(sock, Fixed().resolve(query, None).pack(), cut)
            sock.recv(1000)
        except OSError:
            pass


def ask(cut):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_once, args=(listener, cut)).start()
        try:
            query = DNSRecord.question("www.example")
            return DNSRecord.parse(query.send("127.0.0.1", listener.getsockname()[1], tcp=True, timeout=10)).short()
        except struct.error as error:
            return f"error: {error}"


def be_asked(port, cut):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        received = b""
        try:
            send_in_two(sock, DNSRecord.question("www.example").pack(), cut)
            while data := sock.recv(1000):
                received += data
        except OSError:
            pass
    try:
        return DNSRecord.parse(received[2:]).short() or "no answer"
    except Exception:
        return "no answer"


server = DNSServer(Fixed(), address="127.0.0.1", port=0, tcp=True, logger=Quiet())
server.server.handle_error = lambda request, address: None
server.start_thread()
for side, try_out in ("client", ask), ("server", lambda cut: be_asked(server.server.server_address[1], cut)):
    for cut in (1, 2, 20):
        print(f"{side}, cut after {cut:2} {'byte: ' if cut == 1 else 'bytes:'} {try_out(cut)}")
server.stop()
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(client\|server\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "dnslib 0.9.26 behaves otherwise here"
  exit 1
fi
