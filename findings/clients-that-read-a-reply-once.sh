#!/usr/bin/env bash
# pure-python-adb 0.3.0.dev0, aprslib 0.7.2, pystalk 0.9.1 and onkyo-eiscp 1.2.7 on CPython: a reply that TCP cuts is taken for another.
#
# Their protocols say where a reply ends: by a length, a line end, a header. One would guess that a client reads up to there. Each
# of these has a place where it takes what one recv() gives for the whole. Three raise an error that blames the server or the password:
# aprslib LoginError (aprslib/inet.py: _send_login()), pystalk BeanstalkError with the first letters of the reply (pystalk/client.py),
# onkyo-eiscp AssertionError (eiscp/core.py: get()). pure-python-adb raises nothing: with two of the four digits of the length it
# reads "00" and says that there are no devices (ppadb/connection.py: _recv()).
#
# Seen: what they make of a reply in one segment, and of one that is cut.
#   pure-python-adb, whole: ['emulator-5554']
#   pure-python-adb, cut in the length: []
#   aprslib, whole: logged in
#   aprslib, cut: LoginError
#   pystalk, whole: 7
#   pystalk, cut: BeanstalkError
#   onkyo-eiscp, whole: PWR01
#   onkyo-eiscp, cut in the header: AssertionError
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pure-python-adb==0.3.0.dev0 aprslib==0.7.2 pystalk==0.9.1 \
  onkyo-eiscp==1.2.7
cat >"$work/run.py" <<'PROGRAM'
import logging
import socket
import struct
import threading
import time

import aprslib
import eiscp
import pystalk
from ppadb.client import Client

logging.disable(logging.CRITICAL)


def serve(talk):
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                talk(connection)
                while connection.recv(65536):
                    pass
            except OSError:
                pass

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()[1]


def send(connection, reply, cut):
    connection.sendall(reply[:cut])
    if cut is not None:
        time.sleep(0.3)
        connection.sendall(reply[cut:])


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error).__name__


def adb(cut):
    def talk(connection):
        connection.recv(65536)
        send(connection, b"OKAY0015emulator-5554\tdevice\n", cut)

    return outcome(lambda: [device.serial for device in Client("127.0.0.1", serve(talk)).devices()])


def aprs(cut):
    def talk(connection):
        connection.sendall(b"# aprsc 2.1.14\r\n")
        connection.recv(65536)
        send(connection, b"# logresp N0CALL unverified, server TEST\r\n", cut)

    def log_in():
        aprslib.IS("N0CALL", host="127.0.0.1", port=serve(talk)).connect()
        return "logged in"

    return outcome(log_in)


def beanstalk(cut):
    def talk(connection):
        connection.recv(65536)
        send(connection, b"INSERTED 7\r\n", cut)

    return outcome(lambda: pystalk.BeanstalkClient("127.0.0.1", serve(talk)).put_job("job")[1])


def onkyo(cut):
    def talk(connection):
        connection.recv(65536)
        message = b"!1PWR01\x1a\r\n"
        send(connection, b"ISCP" + struct.pack(">IIB3x", 16, len(message), 1) + message, cut)

    return outcome(lambda: eiscp.eISCP("127.0.0.1", serve(talk)).raw("PWRQSTN"))


print("pure-python-adb, whole:", adb(None))
print("pure-python-adb, cut in the length:", adb(6))
print("aprslib, whole:", aprs(None))
print("aprslib, cut:", aprs(10))
print("pystalk, whole:", beanstalk(None))
print("pystalk, cut:", beanstalk(4))
print("onkyo-eiscp, whole:", onkyo(None))
print("onkyo-eiscp, cut in the header:", onkyo(3))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \([apo]\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
