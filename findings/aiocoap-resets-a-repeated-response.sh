#!/usr/bin/env bash
# aiocoap 0.4.17 on CPython: its client acknowledges a separate response, and answers the same response with a Reset when it comes again.
#
# A CoAP server that cannot answer at once sends an empty acknowledgement, and the response later as a confirmable message. When the
# client's acknowledgement is lost, the server sends that message again. RFC 7252 (4.5) says that the recipient should acknowledge
# each copy with the same acknowledgement. aiocoap remembers no responses (aiocoap/messagemanager.py: dispatch_message(), a comment
# there says so): the request is done with the first copy, and the second is a response that nothing waits for. So a server
# that counts a Reset as "the client has lost the request", and takes back what it has done, errs: the client has the response.
#
# Seen: what the server gets for two copies of one response, half a second apart; and what the client has.
#   for the first copy: acknowledgement
#   for the second copy: reset
#   the client has: b'done'
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiocoap==0.4.17
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import socket
import threading

import aiocoap

KINDS = {4 << 4 | 2 << 4: "acknowledgement", 4 << 4 | 3 << 4: "reset"}
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 0))
server.settimeout(10)
got = []


def serve():
    request, client = server.recvfrom(65536)
    token_size = request[0] & 15
    server.sendto(bytes([0x60, 0]) + request[2:4], client)
    response = bytes([0x40 | token_size, 0x45, 0x77, 0x77]) + request[4 : 4 + token_size] + b"\xffdone"
    for pause in (0.5, 0):
        server.sendto(response, client)
        answer, _ = server.recvfrom(65536)
        got.append(KINDS[answer[0] & 0xF0] if answer[1:] == b"\0\x77\x77" else answer.hex())
        threading.Event().wait(pause)


async def main():
    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    context = await aiocoap.Context.create_client_context()
    request = aiocoap.Message(code=aiocoap.GET, uri=f"coap://127.0.0.1:{server.getsockname()[1]}/work")
    response = await context.request(request).response
    await asyncio.to_thread(serving.join)
    await context.shutdown()
    for copy, answer in zip(("first", "second"), got):
        print(f"for the {copy} copy: {answer}")
    print("the client has:", response.payload)


asyncio.run(main())
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(for\|the\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aiocoap 0.4.17 behaves otherwise here"
  exit 1
fi
