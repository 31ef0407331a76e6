#!/usr/bin/env bash
# tlssysloghandler 2.1.0 and hat-syslog 0.7.28 on CPython: of two syslog handlers for TLS, neither writes what its RFC has.
#
# RFC 5425 has one framing for syslog over TLS: the length in decimal, a space, the message. One would guess that a handler made for
# TLS uses it. tlssysloghandler inherits from the standard library's SysLogHandler and, like it, ends every message with NUL, over
# TLS too (tlssysloghandler/handler.py). A server that reads octet counts takes "<12>" for a bad length. One that reads lines
# waits for a line end for ever. hat-syslog counts octets, as it should. But where RFC 5424 has a BOM before a message in
# UTF-8, the three bytes EF BB BF, it writes the three letters "BOM" (hat/syslog/encoder.py), and its own server strips them
# again. To any other server they are part of the text.
#
# Seen: the end of what a server reads for the message "up", and whether it begins with a length.
#   tlssysloghandler: no length, ...b'>up\x00'
#   hat-syslog: length, ...b'] BOMup'
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, openssl, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check tlssysloghandler==2.1.0 hat-syslog==0.7.28
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout "$work/key" -out "$work/cert" 2>"$work/log"
cat >"$work/run.py" <<'PROGRAM'
import logging
import re
import socket
import ssl
import sys
import threading

import hat.syslog.handler
import tlssysloghandler

server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server_side.load_cert_chain(sys.argv[1], sys.argv[2])
client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
client_side.check_hostname, client_side.verify_mode = False, ssl.CERT_NONE


def log_one(name, make_handler):
    listener = socket.create_server(("127.0.0.1", 0))
    got = []

    def serve():
        plain, _ = listener.accept()
        plain.settimeout(10)
        with server_side.wrap_socket(plain, server_side=True) as peer:
            data = b""
            while b"up" not in data:
                data += peer.recv(65536)
            peer.settimeout(0.5)  # is anything to follow?
            try:
                data += peer.recv(65536)
            except OSError:
                pass
            got.append(data)

    thread = threading.Thread(target=serve)
    thread.start()
    handler = make_handler(listener.getsockname()[1])
    logger = logging.Logger("finding")
    logger.addHandler(handler)
    logger.warning("up")
    thread.join(20)
    handler.close()
    length = re.match(rb"(\d+) (.*)", got[0], re.DOTALL)
    counted = length and int(length[1]) == len(length[2])
    tail = got[0][-4:] if name == "tlssysloghandler" else got[0][-7:]
    print(f"{name}: {'length' if counted else 'no length'}, ...{tail}", flush=True)


log_one(
    "tlssysloghandler",
    lambda port: tlssysloghandler.TLSSysLogHandler(("127.0.0.1", port), socktype=socket.SOCK_STREAM, secure=client_side),
)
log_one("hat-syslog", lambda port: hat.syslog.handler.SyslogHandler("127.0.0.1", port, "TLS"))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" "$work/cert" "$work/key" | tee "$work/seen"
sed -n -e 's/^#   \(tlssys\|hat-\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "tlssysloghandler 2.1.0 or hat-syslog 0.7.28 behaves otherwise here"
  exit 1
fi
