"""A bounded rate: what the clients of the ports for operators share, so that a flood of them does not harm the service."""

import asyncio

__all__ = ["Rate"]


class Rate:
    """Lets `rate` requests a second pass, and `burst` of them at once."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._next = 0.0  # when another may pass

    async def wait_for_turn(self) -> None:
        """Wait until another request may pass."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - self._burst / self._rate) + 1 / self._rate
        if self._next > now:
            await asyncio.sleep(self._next - now)
