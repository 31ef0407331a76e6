#!/usr/bin/env bash
# rinetd 0.73, redir 3.3, simpleproxy 3.5 and xinetd 2.3.15.3, as Debian 12 has them: a client that ends its stream gets no reply.
#
# A client may send its request, end its sending side, as `nc -N` does, and read on. One would guess that a proxy which only copies
# bytes passes that end on and goes on copying the reply. These four close both sides at once. The server sees a client that has
# ended its stream, works, and writes to a connection that is gone. socat does likewise half a second later, by its documented -t, and
# nginx by its documented proxy_half_close. HAProxy passes the end on.
#
# Seen: what a client gets that sends "hello" and ends its stream, from a server that replies to the end of the stream a second later.
#   no proxy: b'got hello'
#   rinetd: b''
#   redir: b''
#   simpleproxy: b''
#   xinetd: b''
#   haproxy: b'got hello'
#
# Exits 0 if this is still so, 1 if it is not. It needs python3, and Debian 12 for amd64: apt-get downloads its packages.
# Nothing is installed. HAProxy, and the library that it needs, are of any version: they are there for comparison.
set -euo pipefail
finding=$(realpath "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq download rinetd=0.73-1 redir=3.3-1 simpleproxy=3.5-1+b2 xinetd=1:2.3.15.3-1+b1 haproxy liblua5.3-0
for package in *.deb; do
  dpkg -x "$package" root
done
cat >run.py <<'PROGRAM'
import os
import socket
import subprocess
import sys
import threading
import time

listener = socket.create_server(("127.0.0.1", 0))
server = listener.getsockname()[1]


def serve_one(connection):
    with connection:
        request = b""
        try:
            while data := connection.recv(65536):
                request += data
            time.sleep(1)
            connection.sendall(b"got " + request)
        except OSError:
            pass


def serve():
    while True:
        threading.Thread(target=serve_one, args=listener.accept()[:1], daemon=True).start()


threading.Thread(target=serve, daemon=True).start()


def ask(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port), 10)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the proxy does not listen"
            time.sleep(0.1)
    with sock:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        reply = b""
        try:
            while data := sock.recv(65536):
                reply += data
        except ConnectionResetError:
            pass
        return reply


def try_proxy(name, *command, config=None):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if config is not None:
        with open(name + ".conf", "w") as file:
            file.write(config.format(port=port, server=server, user=os.environ.get("USER") or "root"))
    proxy = subprocess.Popen(
        ["root/" + command[0], *(part.format(port=port, server=server) for part in command[1:])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LD_LIBRARY_PATH": "root/usr/lib/x86_64-linux-gnu"},
    )
    try:
        print(f"{name}: {ask(port)}", flush=True)
    finally:
        proxy.kill()
        proxy.wait()


print("no proxy:", ask(server), flush=True)
try_proxy("rinetd", "usr/sbin/rinetd", "-f", "-c", "rinetd.conf", config="127.0.0.1 {port} 127.0.0.1 {server}\n")
try_proxy("redir", "usr/bin/redir", "-n", "127.0.0.1:{port}", "127.0.0.1:{server}")
try_proxy("simpleproxy", "usr/bin/simpleproxy", "-L", "127.0.0.1:{port}", "-R", "127.0.0.1:{server}")
try_proxy(
    "xinetd",
    "usr/sbin/xinetd",
    "-dontfork",
    "-f",
    "xinetd.conf",
    config="service proxy\n{{\n type = UNLISTED\n socket_type = stream\n protocol = tcp\n wait = no\n user = {user}\n"
    " port = {port}\n bind = 127.0.0.1\n redirect = 127.0.0.1 {server}\n}}\n",
)
try_proxy(
    "haproxy",
    "usr/sbin/haproxy",
    "-f",
    "haproxy.conf",
    config="defaults\n mode tcp\n timeout connect 9s\n timeout client 9s\n timeout server 9s\n"
    "listen proxy\n bind 127.0.0.1:{port}\n server one 127.0.0.1:{server}\n",
)
PROGRAM
timeout 60 python3 run.py | tee seen
sed -n 's/^#   \(no\|rinetd\|redir\|simpleproxy\|xinetd\|haproxy\)/\1/p' "$finding" >expected
if ! diff expected seen; then
  echo "one of the proxies behaves otherwise here"
  exit 1
fi
