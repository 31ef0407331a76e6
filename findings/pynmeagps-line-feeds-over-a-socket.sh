#!/usr/bin/env bash
# pynmeagps 1.1.8 on CPython: sentences that end in LF alone are read from a file, but not over a socket.
#
# NMEA 0183 ends a sentence with CR LF, but a log file or a serial line in the terminal's usual mode has LF, and a server that
# passes such lines on sends LF. One would guess that NMEAReader takes the same bytes alike wherever they come from. A file or a serial
# line is read by its own readline(), which ends at LF. A socket is read by pynmeagps' own, which ends only at CR LF
# (pynmeagps/socketwrapper.py: readline()), so that all sentences to the end of the stream become one with a wrong
# checksum. With the usual quitonerror=1 it is logged and dropped. On a connection that stays open, nothing comes at all.
#
# Seen: the sentences that NMEAReader gives.
#   CR LF, file: ['GPGLL', 'GPRMC']
#   CR LF, socket: ['GPGLL', 'GPRMC']
#   LF, file: ['GPGLL', 'GPRMC']
#   LF, socket: []
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pynmeagps==1.1.8
cat >"$work/run.py" <<'PROGRAM'
import functools
import io
import operator
import socket

from pynmeagps import NMEAReader


def encode(body, end):
    return b"$%s*%02X%s" % (body, functools.reduce(operator.xor, body), end)


def names(stream):
    return [message.identity for _, message in NMEAReader(stream) if message]


for label, end in (("CR LF", b"\r\n"), ("LF", b"\n")):
    data = encode(b"GPGLL,5327.04319,N,00214.41396,W,223232.00,A,A", end) + encode(b"GPRMC,,V,,,,,,,,,,N", end)
    print(f"{label}, file: {names(io.BytesIO(data))}")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        print(f"{label}, socket: {names(theirs)}")
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen"
sed -n -e 's/^#   \(CR LF\|LF\), /\1, /p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "pynmeagps 1.1.8 behaves otherwise here"
  exit 1
fi
