"""The network: endpoints, binding them, accepting, datagram sockets, and what the kernel tells about a socket."""
