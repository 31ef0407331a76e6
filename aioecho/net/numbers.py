"""Numbers that the system has a largest one of, as text has them."""

__all__ = ["MOST_FD", "MOST_ID", "is_at_most"]

MOST_FD = 2**31 - 1
"""The largest number of a descriptor, a C int."""

MOST_ID = 2**32 - 2
"""The largest number of a user or a group: the next one means none."""


def is_at_most(most: int, digits: str) -> bool:
    """Return whether a number of decimal digits, which may be more than int() takes, is at most `most`."""
    return len(digits.lstrip("0")) <= len(str(most)) and int(digits) <= most
