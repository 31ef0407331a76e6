#!/usr/bin/env bash
# redis-py 8.1.0 on CPython: with its defaults it cannot use a server that has no HELLO, as Redis up to 5 and many servers of RESP2.
#
# From 8.0 on it asks for RESP3 by `HELLO 3`. HELLO came with Redis 6; a server without it answers with an error, as RESP has for
# any command that is not known, and one that has no RESP3 with NOPROTO. The client could go on with RESP2 then, which it can
# be set to (protocol=2), but raises the error from the first command. Errors in reply to CLIENT SETINFO, which it sends too, it
# ignores.
#
# Seen: what get() gives, where the server answers HELLO and CLIENT with an error, and GET with a value.
#   redis 5.2.1: b'value'
#   redis 8.1.0: ResponseError: unknown command 'HELLO'
#   redis 8.1.0, NOPROTO: ResponseError: NOPROTO unsupported protocol version
#   redis 8.1.0, protocol=2: b'value'
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/run.py" <<'PROGRAM'
import socket
import socketserver
import sys
import threading

import redis


class Store(socketserver.StreamRequestHandler):
    no_hello = b"-ERR unknown command 'HELLO'\r\n"

    def handle(self):
        while count := self.rfile.readline():
            command = []
            for _ in range(int(count[1:])):
                size = int(self.rfile.readline()[1:])
                command.append(self.rfile.read(size + 2)[:-2])
            replies = {b"HELLO": self.no_hello, b"GET": b"$5\r\nvalue\r\n"}
            self.wfile.write(replies.get(command[0], b"-ERR unknown command\r\n"))


def get(**options):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Store) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        try:
            with redis.Redis("127.0.0.1", server.server_address[1], socket_timeout=10, **options) as client:
                return client.get("key")
        except redis.RedisError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            server.shutdown()


version = f"redis {redis.__version__}"
print(f"{version}: {get()}")
if sys.argv[1:]:
    Store.no_hello = b"-NOPROTO unsupported protocol version\r\n"
    print(f"{version}, NOPROTO: {get()}")
    print(f"{version}, protocol=2: {get(protocol=2)}")
PROGRAM
for version in 5.2.1 8.1.0; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install --quiet --disable-pip-version-check "redis==$version"
done
{
  timeout 60 "$work/5.2.1/bin/python" "$work/run.py"
  timeout 60 "$work/8.1.0/bin/python" "$work/run.py" more
} | tee "$work/seen"
sed -n 's/^#   redis/redis/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "redis-py behaves otherwise here"
  exit 1
fi
