#!/usr/bin/env bash
# aioftp 0.28.3 on CPython: a reply to PASV without parentheses, or with a text in parentheses before the address, raises ValueError.
#
# RFC 1123 (4.1.2.6) says that servers differ here, and that a client has to look for the first digit of the six numbers, as the
# parentheses of RFC 959's example are not part of the format. One would guess that a client which has EPSV for most servers is lenient
# with the old ones that only know PASV. It takes what stands in the first parentheses (aioftp/client.py: parse_pasv_response()). The
# error is not a StatusCodeError, and names no reply, so it looks like a mistake of the program. The standard library's ftplib looks for
# the numbers.
#
# Seen: the files that a client lists, where EPSV is refused with 500 and PASV is answered so.
#   aioftp, "Entering Passive Mode (127,0,0,1,p,p)": ['a.txt']
#   aioftp, "Entering Passive Mode 127,0,0,1,p,p": ValueError
#   aioftp, "Passive mode (IPv4) (127,0,0,1,p,p)": ValueError
#   ftplib, "Entering Passive Mode (127,0,0,1,p,p)": ['a.txt']
#   ftplib, "Entering Passive Mode 127,0,0,1,p,p": ['a.txt']
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aioftp==0.28.3
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import ftplib

import aioftp

WORDS = (
    "Entering Passive Mode (127,0,0,1,p,p)",
    "Entering Passive Mode 127,0,0,1,p,p",
    "Passive mode (IPv4) (127,0,0,1,p,p)",
)


async def send_list(reader, writer):
    writer.write(b"-rw-r--r-- 1 user group 3 Jan 01 2020 a.txt\r\n")
    writer.close()


def make_handler(words):
    async def serve(reader, writer):
        writer.write(b"220 ready\r\n")
        while line := await reader.readline():
            verb = line.split()[0]
            if verb == b"PASV":
                data = await asyncio.start_server(send_list, "127.0.0.1", 0)
                high, low = divmod(data.sockets[0].getsockname()[1], 256)
                writer.write(b"227 %s\r\n" % words.replace("p,p", f"{high},{low}").encode())
            elif verb == b"LIST":
                writer.write(b"150 here it comes\r\n226 done\r\n")
            elif verb == b"QUIT":
                writer.write(b"221 bye\r\n")
                break
            else:
                writer.write({b"EPSV": b"500 unknown\r\n", b"USER": b"230 in\r\n"}.get(verb, b"200 done\r\n"))
        writer.close()

    return serve


async def list_by_aioftp(port):
    async with aioftp.Client.context("127.0.0.1", port) as client:
        return [str(path) for path, _ in await client.list(raw_command="LIST")]


def list_by_ftplib(port):
    with ftplib.FTP() as client:
        client.connect("127.0.0.1", port, timeout=10)
        client.login()
        lines = []
        client.retrlines("LIST", lines.append)
        return [line.split()[-1] for line in lines]


async def main():
    for name, words in [("aioftp", words) for words in WORDS] + [("ftplib", words) for words in WORDS[:2]]:
        server = await asyncio.start_server(make_handler(words), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            call = list_by_aioftp(port) if name == "aioftp" else asyncio.to_thread(list_by_ftplib, port)
            outcome = await asyncio.wait_for(call, 10)
        except Exception as error:
            outcome = type(error).__name__
        print(f'{name}, "{words}": {outcome}')
        server.close()


asyncio.run(main())
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(aioftp\|ftplib\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "aioftp 0.28.3 behaves otherwise here"
  exit 1
fi
