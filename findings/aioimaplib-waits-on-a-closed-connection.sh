#!/usr/bin/env bash
# aioimaplib 2.0.3 on CPython: a command on a connection that the server has closed waits for its time-out.
#
# IMAP servers close idle connections, with an untagged BYE before. One would guess that the next command fails at once, as with
# the standard library's imaplib, and that a command under way fails with the close. The client is told of the close, and calls back
# conn_lost_cb, but keeps its state and wakes no command (aioimaplib/aioimaplib.py: connection_lost()): the command
# is "sent", and raises TimeoutError after the time-out, 10 s by default, like one to a server that is slow. It does so each time.
# A server that closes to shed load or to stop keeps its clients waiting.
#
# Seen: what noop() gives with a time-out of 2 s, and after how many seconds.
#   aioimaplib, connection open: OK after 0 s
#   aioimaplib, closed by the server before: TimeoutError after 2 s
#   aioimaplib, the same once more: TimeoutError after 2 s
#   aioimaplib, closed by the server meanwhile: TimeoutError after 2 s
#   aioimaplib, conn_lost_cb called: 2 times on 2 connections
#   imaplib, closed by the server before: abort after 0 s
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aioimaplib==2.0.3
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import imaplib
import logging
import socket
import threading
import time

import aioimaplib

logging.disable(logging.CRITICAL)
lost = []


def serve(replies):
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        left = replies
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file:
            connection.sendall(b"* OK hello\r\n")
            for line in file:
                tag, command = line.split()[:2]
                if command.upper() == b"CAPABILITY":
                    connection.sendall(b"* CAPABILITY IMAP4rev1\r\n")
                elif command.upper() == b"NOOP":
                    if not left:
                        return
                    left -= 1
                connection.sendall(tag + b" OK done\r\n")
                if command.upper() == b"NOOP" and not left:
                    time.sleep(0.1)
                    connection.sendall(b"* BYE idle\r\n")
                    return

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()[1]


async def noop(client):
    start = time.monotonic()
    try:
        result = (await client.noop()).result
    except Exception as error:
        result = type(error).__name__
    return f"{result} after {time.monotonic() - start:.0f} s"


async def connect(replies):
    client = aioimaplib.IMAP4("127.0.0.1", serve(replies), timeout=2, conn_lost_cb=lost.append)
    await client.wait_hello_from_server()
    await client.login("user", "password")
    return client


async def main():
    client = await connect(1)
    print("aioimaplib, connection open:", await noop(client))
    await asyncio.sleep(0.5)
    print("aioimaplib, closed by the server before:", await noop(client))
    print("aioimaplib, the same once more:", await noop(client))
    print("aioimaplib, closed by the server meanwhile:", await noop(await connect(0)))
    print(f"aioimaplib, conn_lost_cb called: {len(lost)} times on 2 connections")


def standard():
    client = imaplib.IMAP4("127.0.0.1", serve(1), timeout=2)
    client.login("user", "password")
    client.noop()
    time.sleep(0.5)
    start = time.monotonic()
    try:
        result = client.noop()[0]
    except imaplib.IMAP4.abort as error:
        result = type(error).__name__
    return f"{result} after {time.monotonic() - start:.0f} s"


asyncio.run(main())
print("imaplib, closed by the server before:", standard())
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(aioimaplib\|imaplib\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aioimaplib 2.0.3 or imaplib behaves otherwise here"
  exit 1
fi
