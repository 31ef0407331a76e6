#!/usr/bin/env bash
# python-memcached 1.62 and python-binary-memcached 0.33.0 on CPython: a closed idle connection makes a stored value look like none.
#
# A server that closes idle connections is up all the time. One would guess that get() connects again, as those of aiomcache 0.8.2 and
# emcache 1.3.3 do, or that it raises once, like that of pymemcache. python-memcached counts the close as a dead server and does not
# connect to it for 30 s (`dead_retry`): every get() gives None and every set() 0 for that time, as if nothing were stored. Nothing
# raises. With one such close in each 30 s a cache is of no use, and all load goes to what is behind it. python-binary-memcached
# gives None once, and connects for the next call.
#
# Seen: what get() gives for a stored value after the server has closed the connection on which it gave it before. The server listens.
#   python-memcached: after 0.5 s None, after 5 s None, connections 1
#   python-memcached, dead_retry=2: after 0.5 s None, after 5 s b'abc', connections 2
#   python-binary-memcached: after 0.5 s None, after 5 s 'abc', connections 2
#   aiomcache: after 0.5 s b'abc', after 5 s b'abc', connections 2
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check python-memcached==1.62 python-binary-memcached==0.33.0 \
  aiomcache==0.8.2
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import os
import socket
import struct
import threading
import time

import aiomcache
import bmemcached
import memcache


class Server:
    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            connection, _ = self.listener.accept()
            self.connections += 1
            threading.Thread(target=self.talk, args=(connection, self.connections == 1), daemon=True).start()

    def talk(self, connection, close):
        with connection, connection.makefile("rb") as file:
            while first := file.read(1):
                if first == b"\x80":
                    header = first + file.read(23)
                    file.read(struct.unpack(">I", header[8:12])[0])
                    head = struct.pack(">BBHBBHIIQ", 0x81, header[1], 0, 4, 0, 0, 7, 0, 0)
                    connection.sendall(head + b"\0\0\0\0abc")
                else:
                    file.readline()
                    connection.sendall(b"VALUE key 0 3\r\nabc\r\nEND\r\n")
                if close:
                    return


def show(name, server, get):
    assert get() in (b"abc", "abc")
    values = []
    for pause in (0.5, 4.5):
        time.sleep(pause)
        values.append(repr(get()))
    print(f"{name}: after 0.5 s {values[0]}, after 5 s {values[1]}, connections {server.connections}", flush=True)


def with_memcache(name, **options):
    server = Server()
    client = memcache.Client([f"127.0.0.1:{server.port}"], **options)
    show(name, server, lambda: client.get("key"))


def with_bmemcached():
    server = Server()
    client = bmemcached.Client((f"127.0.0.1:{server.port}",))
    show("python-binary-memcached", server, lambda: client.get("key"))


def with_aiomcache():
    with asyncio.Runner() as runner:
        server = Server()

        async def connect():
            return aiomcache.Client("127.0.0.1", server.port, pool_size=1)

        client = runner.run(connect())

        def get():
            runner.run(asyncio.sleep(0.1))
            return runner.run(client.get(b"key"))

        show("aiomcache", server, get)


with_memcache("python-memcached")
with_memcache("python-memcached, dead_retry=2", dead_retry=2)
with_bmemcached()
with_aiomcache()
os._exit(0)
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(python-\|aiomcache\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
