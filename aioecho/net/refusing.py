"""Having the kernel turn away new TCP clients of a listening socket, whose queue is then accepted before it is closed."""

import array
import socket
import struct
import sys

__all__ = ["drop_connection_requests"]

# Linux's SO_ATTACH_FILTER (asm-generic/socket.h), which the socket module does not have.
SO_ATTACH_FILTER = 26

# A program of the classic packet filter (linux/filter.h), which sees a segment from its TCP header on. Byte 13 has the flags,
# and 2 is SYN: a connection request is dropped. All else is let through, so that handshakes which have begun are completed.
INSTRUCTION = struct.Struct("=HBBI")
PROGRAM = b"".join(
    INSTRUCTION.pack(*instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load a byte
        (0x45, 0, 1, 0x02),  # skip the next if none of these bits is set
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass
    )
)


def drop_connection_requests(sock: socket.socket) -> bool:
    """Have a listening TCP socket drop connection requests from now on; return whether it does.

    Otherwise a client that connects after the last accept(), and before the close(), is connected and then reset. One whose
    request is dropped asks again a second later, and is refused, or reaches what listens there then.
    It can't be undone. Linux alone has it.
    """
    if not sys.platform.startswith("linux") or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    program = array.array("B", PROGRAM)  # tells its address; ctypes, which does too, does not load in subinterpreters
    address, size = program.buffer_info()
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", size // INSTRUCTION.size, address))
    except OSError:  # it is locked, or a sandbox forbids it
        return False
    return True
