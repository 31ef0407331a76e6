#!/usr/bin/env bash
# aiormq 7.2.4 on CPython: channel() raises KeyError at a server that does not list RabbitMQ's extensions.
#
# AMQP 0-9-1 has a server say what it is in a table, server-properties, with six names, such as product and version. "capabilities",
# a list of extensions, is RabbitMQ's own addition to it. One would guess that a client takes its absence for "no extensions". So do
# pika, py-amqp, amqpstorm and aioamqp. aiormq reads self.server_properties["capabilities"] (aiormq/connection.py). connect() works; the
# first channel raises KeyError('capabilities'), also with publisher_confirms=False. aio-pika is made of aiormq. A server of one's own has
# to send at least an empty table there.
#
# Seen: what opening a channel gives, by what the server-properties hold.
#   aiormq, product: KeyError('capabilities')
#   aiormq, product and empty capabilities: opened
#   pika, product: opened
#   amqpstorm, product: opened
#   aioamqp, product: opened
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiormq==7.2.4 pika==1.4.4 amqpstorm==3.1.4 aioamqp==0.15.0
cat >"$work/run.py" <<'PROGRAM'
import asyncio
import logging
import struct

import aioamqp
import aiormq
import amqpstorm
import pika

logging.disable(logging.CRITICAL)
PRODUCT = b"\x07productS" + struct.pack(">I", 3) + b"one"
CAPABILITIES = b"\x0ccapabilitiesF" + struct.pack(">I", 0)


def long_string(data):
    return struct.pack(">I", len(data)) + data


def make_handler(properties):
    async def serve(reader, writer):
        def send(channel, class_, method, arguments=b""):
            payload = struct.pack(">HH", class_, method) + arguments
            writer.write(struct.pack(">BHI", 1, channel, len(payload)) + payload + b"\xce")

        try:
            await reader.readexactly(8)
            send(
                0, 10, 10, b"\0\x09" + long_string(properties) + long_string(b"PLAIN AMQPLAIN") + long_string(b"en_US")
            )
            while True:
                kind, channel, size = struct.unpack(">BHI", await reader.readexactly(7))
                payload = await reader.readexactly(size + 1)
                if kind != 1:
                    continue
                match struct.unpack(">HH", payload[:4]):
                    case 10, 11:
                        send(0, 10, 30, struct.pack(">HIH", 2047, 131072, 0))
                    case 10, 40:
                        send(0, 10, 41, b"\0")
                    case 20, 10:
                        send(channel, 20, 11, long_string(b""))
                    case ((10 | 20 as class_), (40 | 50 as method)):
                        send(channel, class_, method + 1)
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.close()

    return serve


async def use_aiormq(port):
    connection = await aiormq.connect(f"amqp://guest:guest@127.0.0.1:{port}/")
    await connection.channel(publisher_confirms=False)
    await connection.close()


async def use_aioamqp(port):
    transport, protocol = await aioamqp.connect("127.0.0.1", port)
    await protocol.channel()
    await protocol.close(no_wait=True)
    transport.close()


def use_pika(port):
    connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))
    connection.channel()
    connection.close()


def use_amqpstorm(port):
    connection = amqpstorm.Connection("127.0.0.1", "guest", "guest", port=port)
    connection.channel()
    connection.close()


async def main():
    for name, use, words, properties in (
        ("aiormq", use_aiormq, "product", PRODUCT),
        ("aiormq", use_aiormq, "product and empty capabilities", PRODUCT + CAPABILITIES),
        ("pika", use_pika, "product", PRODUCT),
        ("amqpstorm", use_amqpstorm, "product", PRODUCT),
        ("aioamqp", use_aioamqp, "product", PRODUCT),
    ):
        server = await asyncio.start_server(make_handler(properties), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        call = use(port) if asyncio.iscoroutinefunction(use) else asyncio.to_thread(use, port)
        try:
            await asyncio.wait_for(call, 10)
            outcome = "opened"
        except Exception as error:
            outcome = repr(error)
        print(f"{name}, {words}: {outcome}")
        server.close()


asyncio.run(main())
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(aiormq\|pika\|amqpstorm\|aioamqp\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "one of the clients behaves otherwise here"
  exit 1
fi
