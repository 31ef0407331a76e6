"""Streams: the reader, the writer, the protocol under them, and TLS."""
