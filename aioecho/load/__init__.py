"""The load generator: clients that measure a server."""

from aioecho.load.run import LoadResult, LoadSettings, load

__all__ = ["LoadResult", "LoadSettings", "load"]
