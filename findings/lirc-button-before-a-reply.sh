#!/usr/bin/env bash
# lirc 3.1.0 on CPython: a button pressed between a command and its reply raises, and every later reply is taken for the next command's.
#
# A lircd server sends the buttons that are pressed to all its clients, as single lines, on the connection on which it also answers
# commands with packets from BEGIN to END. One would guess that a client for both skips lines up to BEGIN, as irsend does. lirc expects
# BEGIN in the first line that comes (lirc/client.py): with a button before it, it raises and leaves the reply unread. The next
# command gets that reply, without an error, and so on for as long as the connection lives. A reply that TCP cuts within a line
# does likewise: each recv() counts as whole lines (lirc/connection/: readline()). One that is cut at a line end is read right.
#
# Seen: what list_remotes() and then two calls of version() give, where the server sends its first reply so.
#   alone: ['tv', 'radio'], '0.10.1', '0.10.1'
#   behind the line of a button: LircdInvalidReplyPacketError, ['tv', 'radio'], '0.10.1'
#   cut at a line end: ['tv', 'radio'], '0.10.1', '0.10.1'
#   cut within a line: LircdInvalidReplyPacketError, LircdInvalidReplyPacketError, LircdInvalidReplyPacketError
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check lirc==3.1.0
cat >"$work/run.py" <<'PROGRAM'
import socket
import threading
import time

import lirc

DATA = {b"VERSION": b"1\n0.10.1", b"LIST": b"2\ntv\nradio"}
BUTTON = b"0000000000f40bf0 00 KEY_UP remote\n"


def run(name, send_first):
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as file:
            send = send_first
            try:
                for line in file:
                    command = line.strip()
                    send(connection, b"BEGIN\n" + command + b"\nSUCCESS\nDATA\n" + DATA[command] + b"\nEND\n")
                    send = socket.socket.sendall
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    connection = lirc.LircdConnection(
        address=("127.0.0.1", listener.getsockname()[1]),
        socket=socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        timeout=3,
    )
    results = []
    client = lirc.Client(connection=connection)
    for call in (client.list_remotes, client.version, client.version):
        try:
            results.append(repr(call()))
        except lirc.exceptions.LircError as error:
            results.append(type(error).__name__)
        time.sleep(0.3)
    client.close()
    print(f"{name}: {', '.join(results)}")


def cut_at(mark):
    def send(connection, reply):
        place = reply.index(mark)
        connection.sendall(reply[:place])
        time.sleep(0.2)
        connection.sendall(reply[place:])

    return send


run("alone", socket.socket.sendall)
run("behind the line of a button", lambda connection, reply: connection.sendall(BUTTON + reply))
run("cut at a line end", cut_at(b"DATA"))
run("cut within a line", cut_at(b"TA"))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(alone\|behind\|cut\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "lirc 3.1.0 behaves otherwise here"
  exit 1
fi
