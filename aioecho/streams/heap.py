"""The memory of large chunks: having malloc() keep it for the next ones."""

from functools import cache

__all__ = ["keep_large_blocks"]

# Bytes of the largest block that is to come from the heap, and half of what may be free at its top.
LARGE = 2**19


@cache
def keep_large_blocks() -> None:
    """Have malloc() keep the memory of large chunks for the next ones, 1 MiB at most. The first call in a process counts.

    By itself glibc maps a block of more than 128 KiB from the kernel. It gives the top of its heap back once more is free there
    than twice the largest such block that was freed, and at first than 128 KiB. A handler holds one chunk while the next one
    comes, so that was again and again: of a message of 1 MiB 80 pages were mapped and zeroed anew, a third of its processor
    time.

    Both limits follow the largest block that was mapped and freed: mallopt(3), M_MMAP_THRESHOLD. This one touches no page.
    Where malloc() is another one, nothing changes.
    """
    bytes(LARGE)
