"""The servers that are compared, one module each: `python -m benchmarks.servers.NAME PORT [--help]`.

All do the same on 127.0.0.1: send back what comes (`--mode echo`, chunks as they arrive; `--mode lines`, line by line),
each after waiting `--delay` seconds, over TLS with `--cert` and `--key`. Some also serve datagrams (`--mode udp`), and the
example of issue trackers and tutorials (`--mode example`): one request of up to 1,024 bytes, upper case, a wait, a reply.
`--mode once` is that without the wait. `--mode frames` sends back frames of 4 bytes of length, big-endian, and a body, one by
one. `--mode count` reads lines to the end, then says how many there were. `--mode broadcast` greets a client
with a byte, and writes a line that it says to all clients, without waiting for any.
"""
