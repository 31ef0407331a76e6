#!/usr/bin/env bash
# hl7apy 1.3.5 on CPython: its MLLP server answers one message of a connection, and closes it.
#
# MLLP frames messages so that a connection can carry many, and senders keep theirs open. One would guess that MLLPServer answers
# a second message too. Its documentation speaks of a timeout before a connection is closed, and of nothing else that closes it.
# The handler reads one message, answers it and closes (hl7apy/mllp.py: MLLPRequestHandler.handle()). A second message that
# is on its way by then is lost, with no error at the server. The sender may have counted it as sent.
#
# Seen: control numbers of the messages that are acknowledged, and how the connection goes on.
#   one message: [1], closed
#   two messages in one segment: [1], closed
#   the second after the first was acknowledged: [1], closed
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check hl7apy==1.3.5
cat >"$work/run.py" <<'PROGRAM'
import re
import socket
import threading

from hl7apy.mllp import AbstractHandler, MLLPServer


class Acknowledge(AbstractHandler):
    def reply(self):
        number = self.incoming_message.split("|")[9]
        return f"\x0bMSH|^~\\&|A|B|C|D|20260101000000||ACK|{number}|P|2.5\rMSA|AA|{number}\r\x1c\r"


def message(number):
    header = f"MSH|^~\\&|C|D|A|B|20260101000000||ADT^A01^ADT_A01|{number}|P|2.5"
    return f"\x0b{header}\rPID|1||{number}\r\x1c\r".encode()


server = MLLPServer("127.0.0.1", 0, {"ADT^A01^ADT_A01": (Acknowledge,)})
threading.Thread(target=server.serve_forever, daemon=True).start()


def acknowledged(*pieces):
    got, end = b"", "open"
    with socket.create_connection(server.server_address) as sock:
        sock.settimeout(2)
        try:
            for piece in pieces:
                sock.sendall(piece)
                data = sock.recv(65536)
                got += data
                if not data:
                    break
            while data:
                data = sock.recv(65536)
                got += data
            end = "closed"
        except ConnectionError:
            end = "closed"
        except TimeoutError:
            pass
    return f"{[int(number) for number in re.findall(rb'MSA.AA.([0-9]+)', got)]}, {end}"


print("one message:", acknowledged(message(1)))
print("two messages in one segment:", acknowledged(message(1) + message(2)))
print("the second after the first was acknowledged:", acknowledged(message(1), message(2)))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(one\|two\|the\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "hl7apy 1.3.5 behaves otherwise here"
  exit 1
fi
