#!/usr/bin/env bash
# yeelight 0.7.16 on CPython: a reply that comes in two segments is the result "invalid command", without an exception.
#
# A bulb answers with one line of JSON, ended by CR LF. One would guess that the client reads up to the line end, and that whatever
# fails raises BulbException, as its documentation says. It reads once, and what is no whole JSON becomes {"result": ["invalid
# command"]}, as a bulb's answer to a mistake would be (yeelight/main.py: send_command()). turn_on() returns that text in place of
# "ok". get_properties() makes it the value of the first property, and leaves out the others. The rest of the line is
# read with the next reply. A cut before or within the line end alone does no harm.
#
# Seen: what turn_on() and get_properties(["power", "bright"]) give on a new connection.
#   in one segment: ok, {'power': 'on', 'bright': '70', 'current_brightness': '70'}
#   cut after 12 bytes: invalid command, {'power': 'invalid command', 'current_brightness': None}
#   cut before the line end: ok, {'power': 'on', 'bright': '70', 'current_brightness': '70'}
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check yeelight==0.7.16
cat >"$work/run.py" <<'PROGRAM'
import json
import socketserver
import threading
import time

import yeelight

VALUES = {"power": "on", "bright": "70"}


def serve(cut):
    class Bulb(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self):
            request = json.loads(self.rfile.readline())
            known = request["method"] == "get_prop"
            result = [VALUES.get(name, "") for name in request["params"]] if known else ["ok"]
            reply = json.dumps({"id": request["id"], "result": result}).encode() + b"\r\n"
            self.wfile.write(reply[:cut])
            if cut is not None:
                time.sleep(0.3)
                self.wfile.write(reply[cut:])
            self.rfile.read()

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Bulb)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def ask(cut):
    def bulb():
        return yeelight.Bulb("127.0.0.1", port=serve(cut), auto_on=False)

    return f"{bulb().turn_on()}, {bulb().get_properties(['power', 'bright'])}"


print("in one segment:", ask(None))
print("cut after 12 bytes:", ask(12))
print("cut before the line end:", ask(-2))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(in\|cut\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "yeelight 0.7.16 behaves otherwise here"
  exit 1
fi
