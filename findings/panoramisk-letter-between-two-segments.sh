#!/usr/bin/env bash
# panoramisk 1.4 on CPython: a letter of UTF-8 that TCP cuts in two is lost, without an error.
#
# Events of the Asterisk Manager Interface are lines of UTF-8, and TCP may cut them anywhere. One would guess that an event's fields
# are the same however it comes. panoramisk puts together lines that are cut, but decodes every piece by itself first, and ignores
# what is no UTF-8 (panoramisk/ami_protocol.py: data_received()). Both halves of a letter are such, so it vanishes.
# On a busy connection that happens once in a while, and the name of a caller or an extension is then another one.
#
# Seen: the name in an event with "CallerIDName: Jürgen Groß".
#   in one segment: Jürgen Groß
#   cut before the ü: Jürgen Groß
#   cut in the ü: Jrgen Groß
#   cut in the line end: Jürgen Groß
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUTF8=1
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check panoramisk==1.4
cat >"$work/run.py" <<'PROGRAM'
import asyncio

from panoramisk import Manager

EVENT = "Event: Newchannel\r\nCallerIDName: Jürgen Groß\r\nChannel: SIP/1\r\n\r\n".encode()
LETTER = EVENT.index("ü".encode())


async def name_of(*cuts):
    async def serve(reader, writer):
        writer.write(b"Asterisk Call Manager/5.0.1\r\n")
        login = await reader.readuntil(b"\r\n\r\n")
        [number] = [line[9:].strip() for line in login.splitlines() if line.lower().startswith(b"actionid:")]
        writer.write(b"Response: Success\r\nActionID: %s\r\nMessage: Authentication accepted\r\n\r\n" % number)
        for begin, end in zip((0, *cuts), (*cuts, len(EVENT))):
            await asyncio.sleep(0.3)
            writer.write(EVENT[begin:end])
        await done.wait()
        writer.close()

    done, names = asyncio.Event(), asyncio.Queue()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    manager = Manager(host="127.0.0.1", port=port, username="user", secret="word", ping_delay=0)
    manager.register_event("Newchannel", lambda _, event: names.put_nowait(event.CallerIDName))
    await manager.connect()
    try:
        return await asyncio.wait_for(names.get(), 5)
    finally:
        done.set()
        manager.close()
        await asyncio.sleep(0.1)


print("in one segment:", asyncio.run(name_of()))
print("cut before the ü:", asyncio.run(name_of(LETTER)))
print("cut in the ü:", asyncio.run(name_of(LETTER + 1)))
print("cut in the line end:", asyncio.run(name_of(EVENT.index(b"\nChannel"))))
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(in\|cut\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "panoramisk 1.4 behaves otherwise here"
  exit 1
fi
