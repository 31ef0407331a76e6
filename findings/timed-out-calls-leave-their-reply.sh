#!/usr/bin/env bash
# aiostalk 1.3.1 and aiopjlink 1.0.5 on CPython: a call that is cancelled or timed out leaves its reply to the next call.
#
# In beanstalkd's protocol and PJLink replies have no numbers: they come in the order of the requests. So a client that gives up on one
# has to close the connection, or to read its reply later and drop it, as python-mpd2's does. One would guess the same of these two, as
# asyncio.timeout() around a call is common. Neither does: each call reads what comes next (aiostalk.py: _send_cmd();
# aiopjlink/projector.py: transmit()). After a reserve() in such a block put() gets the job that comes later, and raises
# UnknownResponseError, and the calls after it do likewise. aiopjlink's own time-out does it too: as it compares only the name of the
# command, a projector's state is the one of the question before.
#
# Seen: what three calls give. The server answers the first one late, and the others at once. It counts jobs, songs and states.
#   aiostalk, reserve() cancelled, put(), put(): TimeoutError, UnknownResponseError, UnknownResponseError
#   aiopjlink, three times "%1POWR ?": TimeoutError, 0, 1
#   python-mpd2, status() cancelled, status(), status(): TimeoutError, 1, 2
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiostalk==1.3.1 aiopjlink==1.0.5 python-mpd2==3.1.1
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import itertools

import aiopjlink
import aiostalk
from mpd.asyncio import MPDClient

LATE = 0.6


async def start(welcome, end, reply):
    numbers = itertools.count()

    async def serve(reader, writer):
        writer.write(welcome)
        try:
            while True:
                request = await reader.readuntil(end)
                if request.startswith((b"put", b"idle")):
                    await reader.readuntil(end)
                if request.startswith((b"idle", b"noidle")):
                    writer.write(b"OK\n")
                    continue
                number = next(numbers)
                if number == 0:
                    await asyncio.sleep(LATE)
                writer.write(reply(request, number))
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server.sockets[0].getsockname()[1]


async def outcomes(*calls):
    words = []
    for number, call in enumerate(calls):
        try:
            async with asyncio.timeout(LATE / 2 if number == 0 else 10):
                words.append(str(await call()))
        except Exception as error:
            words.append(type(error).__name__)
        if number == 0:
            await asyncio.sleep(LATE)
    return ", ".join(words)


async def use_aiostalk():
    def reply(request, number):
        return b"RESERVED %d 3\r\njob\r\n" % number if request.startswith(b"reserve") else b"INSERTED %d\r\n" % number

    client = aiostalk.Client(("127.0.0.1", await start(b"", b"\r\n", reply)))
    await client.connect()
    return await outcomes(client.reserve, lambda: client.put("job"), lambda: client.put("job"))


async def use_aiopjlink():
    port = await start(b"PJLINK 0\r", b"\r", lambda request, number: b"%%1POWR=%d\r" % number)
    async with aiopjlink.PJLink("127.0.0.1", port, timeout=LATE / 2) as link:

        def ask():
            return link.transmit("POWR", "?", pjclass=aiopjlink.PJClass.ONE)

        return await outcomes(ask, ask, ask)


async def use_mpd():
    client = MPDClient()
    await client.connect(
        "127.0.0.1", await start(b"OK MPD 0.23.5\n", b"\n", lambda request, number: b"song: %d\nOK\n" % number)
    )

    async def ask():
        return (await client.status())["song"]

    return await outcomes(ask, ask, ask)


print("aiostalk, reserve() cancelled, put(), put():", asyncio.run(use_aiostalk()))
print('aiopjlink, three times "%1POWR ?":', asyncio.run(use_aiopjlink()))
print("python-mpd2, status() cancelled, status(), status():", asyncio.run(use_mpd()))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(aiostalk\|aiopjlink\|python\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
