#!/usr/bin/env bash
# aiosmtpd 1.4.6 and smtplib of CPython 3.11 to 3.15: of a message to several recipients their LMTP sends and reads one reply.
#
# LMTP differs from SMTP in this: after the final dot the server sends one reply for each recipient that it has accepted (4.2 of
# RFC 2033). One would guess that a class called LMTP does so. aiosmtpd's has LHLO and no HELO, and one reply (aiosmtpd/lmtp.py). A client
# that goes by the RFC waits for the others until its time-out, and may then send again to recipients that have it. smtplib.LMTP has
# LHLO and Unix sockets, and reads one reply (smtplib.py: data()). So the two fit together, and a test of one by the other passes.
# To a server that goes by the RFC its second message fails: the client takes each reply that is left for that to its next command.
#
# Seen: replies that aiosmtpd sends after the final dot of a message to three recipients; and what smtplib makes of a server that
# sends one for each recipient.
#   aiosmtpd, 1 recipient: 1
#   aiosmtpd, 3 recipients: 1
#   smtplib, 1 recipient, twice: delivered, delivered
#   smtplib, 2 recipients, twice: delivered, SMTPDataError
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiosmtpd==1.4.6
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import smtplib
import socket
import threading

from aiosmtpd.handlers import Sink
from aiosmtpd.lmtp import LMTP


async def count_replies(recipients):
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: LMTP(Sink()), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())

    async def ask(*lines):
        for line in lines:
            writer.write(line + b"\r\n")
            while b"-" in (reply := await reader.readline())[3:4]:
                pass
        return reply

    await reader.readline()
    await ask(b"LHLO client", b"MAIL FROM:<from@example.org>")
    for number in range(recipients):
        await ask(b"RCPT TO:<to%d@example.org>" % number)
    await ask(b"DATA")
    writer.write(b"hello\r\n.\r\nQUIT\r\n")
    replies = (await reader.read()).splitlines()
    writer.close()
    server.close()
    return len([reply for reply in replies if not reply.startswith(b"221")])


def serve(listener):
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as lines:
        connection.sendall(b"220 ready\r\n")
        recipients = 0
        for line in lines:
            verb = line[:4].upper()
            if verb == b"DATA":
                connection.sendall(b"354 go on\r\n")
                while lines.readline() != b".\r\n":
                    pass
                connection.sendall(b"250 delivered\r\n" * recipients)
                recipients = 0
            else:
                recipients += verb == b"RCPT"
                connection.sendall(b"250 done\r\n")


def send_twice(recipients):
    outcomes = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        client = smtplib.LMTP("127.0.0.1", listener.getsockname()[1], timeout=10)
        for _ in range(2):
            try:
                client.sendmail("from@example.org", [f"to{n}@example.org" for n in range(recipients)], "hello\n")
                outcomes.append("delivered")
            except smtplib.SMTPException as error:
                outcomes.append(type(error).__name__)
        client.close()
    return ", ".join(outcomes)


print("aiosmtpd, 1 recipient:", asyncio.run(count_replies(1)))
print("aiosmtpd, 3 recipients:", asyncio.run(count_replies(3)))
print("smtplib, 1 recipient, twice:", send_twice(1))
print("smtplib, 2 recipients, twice:", send_twice(2))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(aiosmtpd\|smtplib\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aiosmtpd 1.4.6 or smtplib behaves otherwise here"
  exit 1
fi
