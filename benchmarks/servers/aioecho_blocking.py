"""aioecho with socketserver's own handler classes, unmodified: each connection in a thread of its pool."""

from __future__ import annotations

from typing import Any

import aioecho

from ._blocking_handlers import HANDLERS, options
from ._options import BACKLOG, HOST

if __name__ == "__main__":
    limits: dict[str, Any] = {"backlog": BACKLOG, "max_threads": options.threads}
    aioecho.run(
        HANDLERS[options.mode], f"tcp://{HOST}:{options.port}", loop=options.loop, limits=aioecho.Limits(**limits)
    )
