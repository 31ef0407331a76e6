#!/usr/bin/env bash
# pymodbus 3.16.1 on CPython: its Modbus/TCP server answers one of several requests that come together, and drops the others.
#
# Three valid "read holding registers" requests with the transaction numbers 1, 2 and 3 come on one connection: one after the other,
# then all in one write. Modbus/TCP has transaction numbers so that several can be under way. The server takes the first
# request out of its buffer, and sending the reply empties that buffer (pymodbus/transport/transport.py, send()).
# The other requests are lost, with no error on either side: a client that waits for their replies times out. Emptying it is meant
# for clients, whose next request it protects from late replies (pull request 2343), but servers send by the same method.
#
# Seen: transaction numbers of the replies within two seconds.
#   one after the other: [1, 2, 3]
#   all in one write: [1]
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pymodbus==3.16.1
cat >"$work/run.py" <<'PROGRAM'
import asyncio

from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

REQUESTS = [bytes.fromhex(f"{number:04x} 0000 0006 01 03 0000 0001") for number in (1, 2, 3)]


async def ask(port, writes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    replies = []
    try:
        async with asyncio.timeout(2):
            for data in writes:
                writer.write(data)
                for _ in range(len(data) // len(REQUESTS[0])):
                    header = await reader.readexactly(6)
                    await reader.readexactly(int.from_bytes(header[4:], "big"))
                    replies.append(int.from_bytes(header[:2], "big"))
    except TimeoutError:
        pass
    writer.close()
    return replies


async def main():
    device = SimDevice(id=1, simdata=[SimData(0, values=[7] * 10, datatype=DataType.REGISTERS)])
    server = ModbusTcpServer(device, address=("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve_forever())
    while not server.transport:
        await asyncio.sleep(0.01)
    port = server.transport.sockets[0].getsockname()[1]
    print("one after the other:", await ask(port, REQUESTS))
    print("all in one write:", await ask(port, [b"".join(REQUESTS)]))
    await server.shutdown()
    serving.cancel()


asyncio.run(main())
PROGRAM
timeout 60 "$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
sed -n -e 's/^#   \(one after\|all in\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "pymodbus 3.16.1 behaves otherwise here"
  exit 1
fi
