#!/usr/bin/env bash
# sliplib 0.7.2 on CPython: a packet that the end of the stream cuts off is given as a whole one.
#
# SLIP marks the end of a packet with one byte, so a receiver can tell a packet that is whole from one without its rest, as a sender
# leaves or a line breaks. One would guess that recv_msg() drops the latter, or raises ProtocolError, and then says that the stream is at its
# end. SlipSocket puts the missing END there by itself (sliplib/slip.py: Driver.receive()), and gives what there is as a message. Only
# one that is cut within an escape sequence raises. Packets of which the first half is valid too, a line of text or a number of digits,
# are then taken for what they are not. SlipStream, for files and pipes, does likewise.
#
# Seen: what recv_msg() gives until the stream is at its end, for these bytes, where "|" stands for END and "\" for ESC.
#   "pay 1000|": b'pay 1000'
#   "pay 10|pay 1000": b'pay 10', b'pay 1000'
#   "pay 10|pay 1": b'pay 10', b'pay 1'
#   "pay 10|pay 1\": b'pay 10', ProtocolError
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check sliplib==0.7.2
cat >"$work/run.py" <<'PROGRAM'
import socket

from sliplib import ProtocolError, SlipSocket

for text in "pay 1000|", "pay 10|pay 1000", "pay 10|pay 1", "pay 10|pay 1\\":
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(text.encode().replace(b"|", b"\xc0").replace(b"\\", b"\xdb"))
        theirs.shutdown(socket.SHUT_WR)
        receiver = SlipSocket(ours)
        messages = []
        while True:
            try:
                message = receiver.recv_msg()
            except ProtocolError as error:
                messages.append(type(error).__name__)
                continue
            if not message:
                break
            messages.append(repr(message))
    print(f'"{text}":', ", ".join(messages))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \("pay\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "sliplib 0.7.2 behaves otherwise here"
  exit 1
fi
