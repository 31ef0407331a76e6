"""What was probably meant by a string that names no endpoint."""

import re

__all__ = ["hint_at_endpoint"]


def hint_at_endpoint(text: str) -> str:
    """Return what an error message says first of a string that names no endpoint: what was probably meant, or ""."""
    if match := re.fullmatch(r"(?:[a-z]*:(?://)?)?([0-9]+)", text):
        return f"write 127.0.0.1:{match[1]}, or *:{match[1]} to listen on all addresses; "
    if text.startswith(("/", "./")):
        return f"write unix:{text}; "
    if match := re.fullmatch(r"(?:tls|ssl|tcps)(://.+)", text):
        return f"write tcp{match[1]}, and give the server a certificate by ssl= (--ssl-certfile); "
    if match := re.fullmatch(r"(tcp|udp):/?([^/]+)", text):
        return f"write {match[1]}://{match[2]}; "
    scheme = text[:6] if text.startswith(("tcp://", "udp://")) else ""
    rest = text.removeprefix(scheme)
    if match := re.fullmatch(r"([0-9a-fA-F:]*::?[0-9a-fA-F:]*):([0-9]+)", rest):
        return f"write {scheme or 'tcp://'}[{match[1]}]:{match[2]}; "
    if re.fullmatch(r"\[[^\]]+\]:?|[\w.*-]+:?", rest):
        return f"a port is missing, as in {scheme or 'tcp://'}{rest.rstrip(':')}:9999; "
    if match := re.fullmatch(r"[^:/]*:([^0-9].*|[0-9]+[^0-9/?].*)", rest):
        return f"{match[1]!r} is no port; "
    return ""
