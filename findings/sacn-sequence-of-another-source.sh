#!/usr/bin/env bash
# sacn 1.11.0 on CPython: its receiver drops packets of one source because of the sequence numbers of another.
#
# In E1.31 each source counts the packets of a universe for itself, and a receiver drops one with a number up to 19 behind the last
# of the same source. Two sources for a universe, a console and its backup, are what priorities are for. One would guess
# that the receiver keeps a number for each source. It keeps one for each universe (sacn/receiving/receiver_handler.py: is_legal_sequence()).
# So when the other console takes over and its count is up to 19 behind, its packets are dropped until it has caught up. At rest
# a source sends about one packet a second: the lights stay as they were for up to 20 seconds. With equal priorities the one behind
# is never heard at all. It depends on two counters, so it comes and goes.
#
# Seen: the levels that a listener gets. Source A sends level 10 with number 100, then source B with a higher priority sends 1 to 5, with
# numbers from the one named. At last both send in turns.
#   A alone, numbers 100 to 104: 10 11 12 13 14
#   B from 101: 10 1 2 3 4 5
#   B from 50: 10 1 2 3 4 5
#   B from 98: 10 4 5
#   B from 90: 10
#   A and B in turns, equal priorities, B from 95: 10 11 12
#
# Exits 0 if this is still so, 1 if it is not. It needs a Python with venv, and a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check sacn==1.11.0
cat >"$work/run.py" <<'PROGRAM'
import socket
import time

import sacn
from sacn.messages.data_packet import DataPacket


def levels_of(packets):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    levels = []
    receiver = sacn.sACNreceiver(bind_address="127.0.0.1", bind_port=port)
    receiver.register_listener("universe", lambda packet: levels.append(packet.dmxData[0]), universe=1)
    receiver.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for source, number, priority, level in packets:
            packet = DataPacket(
                tuple(source * 16), "console", 1, dmxData=(level,) + (0,) * 511, sequence=number, priority=priority
            )
            sender.sendto(bytes(packet.getBytes()), ("127.0.0.1", port))
            time.sleep(0.05)
    time.sleep(0.3)
    receiver.stop()
    return " ".join(map(str, levels))


print("A alone, numbers 100 to 104:", levels_of([(b"a", 100 + n, 100, 10 + n) for n in range(5)]))
for first in 101, 50, 98, 90:
    packets = [(b"a", 100, 100, 10)] + [(b"b", first + n, 150, 1 + n) for n in range(5)]
    print(f"B from {first}:", levels_of(packets))
turns = [packet for n in range(3) for packet in ((b"a", 100 + n, 100, 10 + n), (b"b", 95 + n, 100, 1 + n))]
print("A and B in turns, equal priorities, B from 95:", levels_of(turns))
PROGRAM
timeout 60 "$work/venv/bin/python" -W ignore "$work/run.py" | tee "$work/seen"
sed -n 's/^#   \(A\|B\)/\1/p' "$0" >"$work/expected"
if ! diff "$work/expected" "$work/seen"; then
  echo "sacn 1.11.0 behaves otherwise here"
  exit 1
fi
