"""Serving datagrams: the server, a datagram's task, the sessions of peers."""
