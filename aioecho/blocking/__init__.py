"""Handlers of socketserver's, which run in threads: for streams and for datagrams."""
