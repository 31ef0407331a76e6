#!/usr/bin/env bash
# pynntp 2.0.1 on CPython: it gives a line of an article that starts with a dot twice, with one dot and with two.
#
# NNTP ends a text with a line of one dot, so a server puts a dot before each line that starts with one, and the client takes it away
# (3.1.1 of RFC 3977). pynntp takes it away and gives the line, and then gives the line as it came too (nntp/nntp.py: _info(),
# where an `else` is missing). Headers, bodies, lists and overviews come this way. Nothing raises: the article is longer than it was, and
# its digest or signature does not fit. What it posts is right: it adds one dot.
#
# Seen: the body of an article, as the server has it and as the client gives it.
#   sent as [b'a', b'..b', b'..', b'c.', b'.'], read as [b'a', b'.b', b'..b', b'.', b'..', b'c.']
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pynntp==2.0.1
cat >"$work/run.py" <<'PROGRAM'
import socketserver
import threading

import nntp

BODY = [b"a", b".b", b".", b"c."]
WIRE = [b"." + line if line.startswith(b".") else line for line in BODY] + [b"."]


class News(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"200 hello\r\n")
        for line in self.rfile:
            if line.startswith(b"BODY"):
                self.wfile.write(b"222 1 <1@example.org>\r\n" + b"".join(part + b"\r\n" for part in WIRE))
            elif line.startswith(b"MODE READER"):
                self.wfile.write(b"201 no posting\r\n")
            elif line.startswith(b"QUIT"):
                self.wfile.write(b"205 bye\r\n")
                return
            else:
                self.wfile.write(b"500 not known\r\n")


with socketserver.ThreadingTCPServer(("127.0.0.1", 0), News) as server:
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever).start()
    try:
        with nntp.NNTPClient("127.0.0.1", server.server_address[1], timeout=10) as client:
            print(f"sent as {WIRE}, read as {client.body(1).split(bytes([13, 10]))[:-1]}")
    finally:
        server.shutdown()
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   sent/sent/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "pynntp 2.0.1 behaves otherwise here"
  exit 1
fi
