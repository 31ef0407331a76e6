#!/usr/bin/env bash
# CoAPthon3 1.0.2 on CPython: its client acknowledges a response that comes apart from the acknowledgement, and drops it.
#
# A CoAP server that cannot answer at once sends an empty acknowledgement, and the response later with a message number of its own; the
# token says which request it answers (5.2.2 of RFC 7252). Servers do so by themselves for work that takes long: aiocoap's after 0.1 s.
# The client gets that response and acknowledges it, but its call waits for a response with the message number of the request
# (coapthon/client/helperclient.py: send_request()): get() returns None at the end of its time-out, and without one it waits
# on. A server sees its work done and acknowledged. The acknowledgement has a token, which an empty message must not
# have (4.1: a format error), so a strict server drops it and sends the response again.
#
# Seen: what get() gives for "done", and what the server gets after its response.
#   with the acknowledgement: 'done', then nothing
#   0.3 s after it: None, then acknowledgement with a token of 2 bytes
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check CoAPthon3==1.0.2
cat >"$work/run.py" <<'PROGRAM'
import logging
import os
import socket
import threading
import time

from coapthon.client.helperclient import HelperClient

logging.disable(logging.CRITICAL)


def run(separate):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    server.settimeout(10)
    after = ["nothing"]

    def serve():
        request, client = server.recvfrom(65536)
        token_size = request[0] & 15
        rest = request[4 : 4 + token_size] + b"\xffdone"
        if not separate:
            server.sendto(bytes([0x60 | token_size, 0x45]) + request[2:4] + rest, client)
        else:
            server.sendto(bytes([0x60, 0]) + request[2:4], client)
            time.sleep(0.3)
            server.sendto(bytes([0x40 | token_size, 0x45, 0x77, 0x77]) + rest, client)
        server.settimeout(2)
        try:
            answer, _ = server.recvfrom(65536)
        except TimeoutError:
            return
        if answer[0] & 0xF0 == 0x60 and answer[1:4] == b"\0\x77\x77":
            after[0] = f"acknowledgement with a token of {answer[0] & 15} bytes"
        else:
            after[0] = answer.hex()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    client = HelperClient(server=server.getsockname())
    response = client.get("work", timeout=3)
    serving.join()
    return f"{response and response.payload!r}, then {after[0]}"


print("with the acknowledgement:", run(False))
print("0.3 s after it:", run(True), flush=True)
os._exit(0)
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(with\|0.3\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "CoAPthon3 1.0.2 behaves otherwise here"
  exit 1
fi
