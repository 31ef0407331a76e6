#!/usr/bin/env bash
# pymodbus 3.16.1 on CPython: its framer for Modbus/TCP loses a request that follows a request of 8 bytes, for one way of cutting
# the stream.
#
# Two valid requests come on one connection: "read exception status" (function 7, an MBAP length of 2, so 8 bytes in all),
# then "read holding registers" (function 3, 12 bytes). If the first 9 of these 20 bytes come in one piece, the framer uses up
# all 9 for the first frame (pymodbus/framer/socket.py: `if msg_len == 8 and data_len == 9: msg_len = 9`). What is left
# begins one byte too late, so the second request is never found, nor is any after it. MBAP says how long the frame is: 8 bytes.
#
# Seen: transaction numbers of the requests found, and how many bytes were never used.
#   cut after  8 bytes: [1, 2], left over 0
#   cut after  9 bytes: [1], left over 11
#   cut after 10 bytes: [1, 2], left over 0
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pymodbus==3.16.1
cat >"$work/run.py" <<'PROGRAM'
from pymodbus.framer import FramerSocket
from pymodbus.pdu import DecodePDU

STATUS = bytes.fromhex("0001 0000 0002 01 07")
READ = bytes.fromhex("0002 0000 0006 01 03 0000 0001")

for cut in (8, 9, 10):
    framer = FramerSocket(DecodePDU(is_server=True))
    stream, rest, found = STATUS + READ, b"", []
    for piece in (stream[:cut], stream[cut:]):
        rest += piece
        while True:
            used, request = framer.handleFrame(rest, 0, 0)
            rest = rest[used:]
            if request is None:
                break
            found.append(request.transaction_id)
    print(f"cut after {cut:2} bytes: {found}, left over {len(rest)}")
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   cut/cut/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "pymodbus 3.16.1 behaves otherwise here"
  exit 1
fi
