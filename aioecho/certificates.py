"""What a server serves TLS with, as files that are renewed while it serves: TLS."""

import math
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aioecho.exceptions import CertificateError

__all__ = ["TLS", "Loaded"]

VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

# The fields in which the TLS of a name may differ: a switch of context in mid-handshake changes no more.
OF_A_NAME = {"cert", "key", "password"}

HOST_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE | re.ASCII)

Password = str | bytes | Callable[[], str | bytes] | None
FileName = str | os.PathLike[str]


@dataclass(frozen=True)
class TLS:
    """What to serve TLS with: names of files (PEM), which are loaded at the start, and again when they have changed.

    For the argument `ssl` of servers, serve() and run(). It can be pickled, if its password can. A program that needs more than
    this gives an ssl.SSLContext instead, which is never loaded anew.

    Raises ValueError, naming the value, if one makes no sense. The files are read when the server starts.
    """

    cert: FileName
    """The certificate, and behind it the ones that lead to a known authority."""

    key: FileName | None = None
    """Its private key. None: it is in the same file."""

    _: KW_ONLY

    client_ca: FileName | None = None
    """Authorities whose certificates clients must have. None: clients are asked for none."""

    client_cert: str = "required"
    """Whether a client must have a certificate, with `client_ca`: "required" or "optional"."""

    crl: FileName | None = None
    """Certificates of clients that their authority has revoked; for `client_ca`."""

    min_version: str = "TLSv1.2"
    """The oldest version: "TLSv1.2" or "TLSv1.3"."""

    ciphers: str | None = None
    """The cipher suites of TLS 1.2, in OpenSSL's words. None: as Python has them."""

    alpn: Sequence[str] = ()
    """The protocols that the server speaks, the preferred first, for ALPN."""

    names: Mapping[str, "TLS"] = field(default_factory=dict)
    """Other certificates by the name that a client asks for (SNI): "b.example", or "*.b.example" for all directly under it.
    They differ in `cert`, `key` and `password` alone."""

    num_tickets: int | None = None
    """Session tickets of TLS 1.3 that a client gets, with which it comes back at less cost. None: as OpenSSL has it, 2. With 0,
    what a client that only writes and closes has sent is not lost: closing with tickets unread resets a connection."""

    password: Password = field(default=None, repr=False)
    """The password of the private key, or a function that returns it."""

    poll: float | None = 60.0
    """Seconds between two looks at whether a file has changed. None: only reload_tls() and SIGHUP load them anew."""

    def __post_init__(self) -> None:
        for name in ("cert", "key", "client_ca", "crl"):
            path = getattr(self, name)
            if not isinstance(path, str | os.PathLike) and (path is not None or name == "cert"):
                raise ValueError(f"{name} must be the name of a file, not {path!r}")
        if self.min_version not in tuple(VERSIONS):  # a tuple: what cannot be hashed is no version either
            raise ValueError(f"min_version must be {' or '.join(map(repr, VERSIONS))}, not {self.min_version!r}")
        if self.client_cert not in ("required", "optional"):
            raise ValueError(f"client_cert must be 'required' or 'optional', not {self.client_cert!r}")
        if self.crl is not None and self.client_ca is None:
            raise ValueError("crl is for the certificates of clients, and needs client_ca")
        if isinstance(self.alpn, str):
            raise ValueError(f"alpn must be a sequence of names, as ({self.alpn!r},), not {self.alpn!r}")
        for protocol in self.alpn:
            if not (isinstance(protocol, str) and protocol.isascii() and 0 < len(protocol) < 256):
                raise ValueError(f"alpn must hold names of 1 to 255 ASCII characters, not {protocol!r}")
        if self.num_tickets is not None and not (type(self.num_tickets) is int and self.num_tickets >= 0):
            raise ValueError(f"num_tickets must be a number, 0 or more, or None, not {self.num_tickets!r}")
        if self.ciphers is not None and not isinstance(self.ciphers, str):
            raise ValueError(f"ciphers must be a text, as OpenSSL reads it, or None, not {self.ciphers!r}")
        if self.password is not None and not (isinstance(self.password, str | bytes) or callable(self.password)):
            # Not its value: this may come to a log.
            raise ValueError(f"password must be a text, bytes or a function, not {type(self.password).__name__}")
        if self.poll is not None and not (isinstance(self.poll, int | float) and 0 < self.poll < math.inf):
            raise ValueError(f"poll must be a number of seconds above 0, or None, not {self.poll!r}")
        self._check_names()

    def _check_names(self) -> None:
        if not isinstance(self.names, Mapping):
            raise ValueError(f'names must be a mapping, as {{"b.example": TLS("b.pem")}}, not {self.names!r}')
        plain = TLS.__dataclass_fields__
        for name, tls in self.names.items():
            if not isinstance(name, str) or not isinstance(tls, TLS):
                raise ValueError(
                    f'names must have a TLS for each name, as "b.example": TLS("b.pem"), not {name!r}: {tls!r}'
                )
            if not HOST_NAME.fullmatch(name):
                raise ValueError(
                    f"names must be as clients ask for them, in ASCII: 'b.example', '*.b.example' or 'xn--bcher-kva.example',"
                    f" not {name!r}"
                )
            for each in fields(tls):
                if each.name in OF_A_NAME:
                    continue
                value = getattr(tls, each.name)
                default = {} if each.name == "names" else plain[each.name].default
                if value not in (default, getattr(self, each.name)) or (each.name == "names" and value):
                    raise ValueError(
                        f"the TLS of the name {name!r} may differ in cert, key and password alone, not in {each.name}"
                    )

    def files(self) -> list[str]:
        """Return the names of all files that it is loaded from."""
        own = [os.fspath(path) for path in (self.cert, self.key, self.client_ca, self.crl) if path is not None]
        return own + [path for tls in self.names.values() for path in tls.files()]

    def load(self) -> "Loaded":
        """Make a new context of what the files hold now.

        Raises:
            CertificateError: a file cannot be read, or a key is not its certificate's. The message is one line.
        """
        context, not_before, not_after = self._load(self)
        contexts = {}
        for name, tls in self.names.items():
            contexts[name.lower()], starts, ends = tls._load(self)
            not_before, not_after = max(not_before, starts), min(not_after, ends)

        def choose(sock: Any, name: str | None, _context: ssl.SSLContext) -> None:
            sock.asked_for = name
            chosen = contexts.get(name.lower()) if name is not None else None
            if chosen is None and name is not None:
                chosen = contexts.get("*." + name.lower().partition(".")[2])
            if chosen is not None:
                sock.context = chosen

        context.sni_callback = choose
        return Loaded(context, not_before, not_after)

    def _load(self, common: "TLS") -> tuple[ssl.SSLContext, float, float]:
        """Return a context with this certificate and all else as in `common`; and since and until when it is valid."""
        cert, key = os.fspath(self.cert), os.fspath(self.key) if self.key is not None else None
        password = self._ask_password(cert)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = VERSIONS[common.min_version]
        try:
            # Without a password OpenSSL would ask for it on the terminal, and wait.
            context.load_cert_chain(cert, key, password or "")
            not_before, not_after = validity(
                ssl.PEM_cert_to_DER_cert(first_certificate(Path(cert).read_text("latin-1")))
            )
        except (OSError, ValueError, IndexError) as error:
            reason = _explain(error, cert, key, password)
            raise CertificateError(f"cannot use {cert}{f' with {key}' if key else ''}: {reason}") from error
        if common.client_ca is not None:
            common._verify_clients(context, common.client_ca)
        if common.ciphers is not None:
            try:
                context.set_ciphers(common.ciphers)
            except ssl.SSLError as error:
                raise CertificateError(
                    f"OpenSSL knows none of the ciphers {common.ciphers!r} for TLS 1.2; the ones of TLS 1.3 are not chosen so"
                ) from error
        # A handshake costs the server more than its client. OpenSSL 3 lets no client ask for another one, 1.1.1 does.
        context.options |= ssl.OP_NO_RENEGOTIATION
        if common.num_tickets is not None:
            context.num_tickets = common.num_tickets
        if common.alpn:
            context.set_alpn_protocols(list(common.alpn))
        return context, not_before, not_after

    def _verify_clients(self, context: ssl.SSLContext, client_ca: FileName) -> None:
        """Have a context ask clients for certificates of `client_ca`."""
        for path in (client_ca, self.crl):
            if path is None:
                continue
            try:
                context.load_verify_locations(path)
            except (OSError, ValueError) as error:
                raise CertificateError(f"cannot use {os.fspath(path)}: {_explain_ca(error)}") from error
        if self.crl is not None:
            if not context.cert_store_stats()["crl"]:
                # OpenSSL would refuse every client: it knows of no list to look into.
                raise CertificateError(f"cannot use {os.fspath(self.crl)}: there is no revocation list (PEM) in it")
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        context.verify_mode = ssl.CERT_REQUIRED if self.client_cert == "required" else ssl.CERT_OPTIONAL

    def _ask_password(self, cert: str) -> str | bytes | None:
        try:
            password = self.password() if callable(self.password) else self.password
        except Exception as error:  # else the poll, which asks again, would end with it
            raise CertificateError(f"cannot use {cert}: the function for its password raised {error!r}") from error
        if not isinstance(password, str | bytes | None):
            raise CertificateError(
                f"cannot use {cert}: the function for its password returned {type(password).__name__}, not str or bytes"
            )
        return password


class Loaded:
    """A context, and the time (in seconds since 1970) from which and up to which all its certificates are valid."""

    def __init__(self, context: ssl.SSLContext, not_before: float, not_after: float) -> None:
        self.context = context
        self.not_before = not_before
        self.not_after = not_after

    def mistake(self) -> str | None:
        """Return what is wrong with a certificate today, None if nothing is."""
        now = time.time()
        if now > self.not_after:
            return f"the certificate expired on {date(self.not_after)}"
        if now < self.not_before:
            return f"the certificate is not valid before {date(self.not_before)}"
        return None


def date(seconds: float) -> str:
    """Return a time as people read it: 2027-02-24 12:00 UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def first_certificate(text: str) -> str:
    """Return the first certificate of a PEM file. Raises ValueError if there is none."""
    found = re.search(r"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.+?)-----END ", text, re.DOTALL)
    if found is None:
        raise ValueError("there is no certificate (PEM) in it")
    return f"{ssl.PEM_HEADER}{found[1]}{ssl.PEM_FOOTER}\n"


def validity(der: bytes) -> tuple[float, float]:
    """Return from when to when a certificate is valid, in seconds since 1970: RFC 5280, 4.1.2.5.

    Raises ValueError if that is not where it should be.
    """
    certificate = _elements(der)[0][1]
    fields_ = _elements(_elements(certificate)[0][1])
    if fields_[0][0] == 0xA0:  # the version, which the first lacks
        fields_ = fields_[1:]
    # serial number, algorithm, issuer, validity
    times = _elements(fields_[3][1])
    return _time(*times[0]), _time(*times[1])


def _elements(der: bytes) -> list[tuple[int, bytes]]:
    """Return the tag and the content of each element of a DER sequence's content."""
    found, at = [], 0
    while at < len(der):
        tag, size = der[at], der[at + 1]
        at += 2
        if size > 0x80:
            count = size - 0x80
            size, at = int.from_bytes(der[at : at + count], "big"), at + count
        if size > len(der) - at:
            raise ValueError("the certificate is cut off")
        found.append((tag, der[at : at + size]))
        at += size
    return found


def _time(tag: int, text: bytes) -> float:
    kind = "%y%m%d%H%M%SZ" if tag == 0x17 else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode("ascii"), kind).replace(tzinfo=UTC).timestamp()


def _explain_ca(error: OSError | ValueError) -> object:
    """Return why the certificates of authorities, or what they have revoked, cannot be loaded."""
    if not isinstance(error, ssl.SSLError):
        return getattr(error, "strerror", None) or error
    if error.reason == "NO_CERTIFICATE_OR_CRL_FOUND":
        return "there is no certificate or revocation list (PEM) in it"
    return f"what is in it is cut off or damaged ({error.strerror or error})"


def _explain(error: Exception, certfile: str, keyfile: str | None, password: object) -> object:
    """Return why a certificate and its key cannot be loaded. OpenSSL's own reason is mostly "PEM lib"."""
    if not isinstance(error, ssl.SSLError):
        return getattr(error, "strerror", None) or error
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the private key is not that of the certificate"
    try:
        certificate, key = Path(certfile).read_bytes(), Path(keyfile or certfile).read_bytes()
    except OSError:  # such as a pipe's, that was read
        return error.strerror or error
    if b"CERTIFICATE-----" not in certificate:
        return f"there is no certificate (PEM) in {certfile}"
    if b"PRIVATE KEY-----" not in key:
        return f"there is no private key (PEM) in {keyfile or certfile}"
    if b"ENCRYPTED" in key:
        return (
            "the password is not the private key's" if password else "the private key is encrypted: give its password"
        )
    try:
        validity(ssl.PEM_cert_to_DER_cert(first_certificate(certificate.decode("latin-1"))))
    except (ValueError, IndexError):
        return f"a certificate in {certfile} is cut off or damaged"
    return f"a certificate in {certfile}, or the key in {keyfile or certfile}, is cut off or damaged"
