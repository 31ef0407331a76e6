"""Serving connections: admission, handlers, a connection's life, the drain, the timeout sweeper."""
