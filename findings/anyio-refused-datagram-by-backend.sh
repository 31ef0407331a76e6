#!/usr/bin/env bash
# anyio 4.16.0 on CPython: a datagram that is refused raises on trio, and is silence on asyncio and uvloop.
#
# With a connected UDP socket the kernel says when nothing listens at the other end: ICMP's "port unreachable" is the error of the next call.
# anyio is to behave alike on its backends, so one would guess that receive() raises BrokenResourceError everywhere. On trio it does, and the
# socket is as good as before. On asyncio error_received() keeps the error in an attribute that a socket for datagrams never looks at
# (anyio/_backends/_asyncio.py: DatagramProtocol). So a client that asks a server which is not there waits for its time-out, or for
# ever without one, and a program tested on one backend fails otherwise on the other.
#
# Seen: what receive() gives within a second after each of two datagrams to a port where nothing listens, and after a third, to a server.
#   asyncio: nothing, nothing, b'reply'
#   uvloop: nothing, nothing, b'reply'
#   trio: BrokenResourceError, BrokenResourceError, b'reply'
#   plain socket: ConnectionRefusedError, ConnectionRefusedError, b'reply'
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check anyio==4.16.0 trio==0.35.0 uvloop==0.23.0
cat >"$work/run.py" <<'PROGRAM'
import socket
import threading

import anyio


def bind(port=0):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", port))
    return server


def free_port():
    with bind() as server:
        return server.getsockname()[1]


def answer(server):
    with server:
        server.sendto(b"reply", server.recvfrom(100)[1])


async def ask_by_anyio():
    port = free_port()
    outcomes = []
    async with await anyio.create_connected_udp_socket("127.0.0.1", port) as client:
        for number in range(3):
            if number == 2:
                threading.Thread(target=answer, args=(bind(port),), daemon=True).start()
            await client.send(b"request")
            outcome = "nothing"
            with anyio.move_on_after(1):
                try:
                    outcome = repr(await client.receive())
                except anyio.BrokenResourceError as error:
                    outcome = type(error).__name__
            outcomes.append(outcome)
    return ", ".join(outcomes)


def ask_by_socket():
    port = free_port()
    outcomes = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", port))
        client.settimeout(1)
        for number in range(3):
            if number == 2:
                threading.Thread(target=answer, args=(bind(port),), daemon=True).start()
            client.send(b"request")
            try:
                outcomes.append(repr(client.recv(100)))
            except OSError as error:
                outcomes.append(type(error).__name__)
    return ", ".join(outcomes)


print("asyncio:", anyio.run(ask_by_anyio))
print("uvloop:", anyio.run(ask_by_anyio, backend_options={"use_uvloop": True}))
print("trio:", anyio.run(ask_by_anyio, backend="trio"))
print("plain socket:", ask_by_socket())
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(asyncio\|uvloop\|trio\|plain\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "anyio 4.16.0 behaves otherwise here"
  exit 1
fi
