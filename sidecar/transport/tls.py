"""TLS where clients come in, with files that rotate.

A context keeps what it has read. `Listening` is the one that the listener holds, and hands each new
connection to another, made of the files as they are now: certificate, key and clients' authorities
change together, and a client whose session began under the old ones starts anew. Swapping contexts
in a callback for the server's name would leave parts of the first one in force.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sidecar.config import Settings, Tls
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

Value = TypeVar("Value")

log = logging.getLogger("sidecar.transport.tls")


class Listening(ssl.SSLContext):
    """The listener's context: each connection is of the newest files that can be used.

    Raises:
        ConfigError: they can not be used at the start.
    """

    def __new__(cls, tls: Tls) -> Listening:  # noqa: D102 (the base class needs its argument here)
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._seen = _stamps(tls)
        self._newest = context(tls)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """The beginning of a connection."""
        return self._current().wrap_bio(*args, **kwargs)

    def _current(self) -> ssl.SSLContext:
        stamps = _stamps(self._tls)
        if stamps != self._seen:
            self._seen = stamps  # before they are read: what changes meanwhile is read again
            try:
                self._newest = context(self._tls)
                log.info("tls: the files have changed, and are in use")
            except ConfigError as error:
                log.error("tls: the files have changed, and the old ones stay in use: %s", error)
        return self._newest


class Handed(ssl.SSLContext):
    """The listener's context where certificates are in no file: each connection is of the newest.

    Until `use` is called there is none, and no handshake succeeds.
    """

    def __new__(cls) -> Handed:  # noqa: D102 (the base class needs its argument here)
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self) -> None:
        self._newest = _bare()

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """The beginning of a connection."""
        return self._newest.wrap_bio(*args, **kwargs)

    def use(self, chain: bytes, key: bytes) -> None:
        """Take these for connections from now on. OpenSSL reads files alone: this one is memory."""
        made = _bare()
        with open(os.memfd_create("tls", os.MFD_CLOEXEC), "wb") as file:  # noqa: PTH123 (no path)
            file.write(key + chain)
            file.flush()
            made.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        self._newest = made


def check(settings: Settings) -> None:
    """Look at the files, and at who clients with certificates then are.

    Raises:
        ConfigError: with every problem.
    """
    tls, spiffe, proxy = settings.tls, settings.identity.spiffe, settings.identity.proxy
    asking = tls is not None and tls.client_ca is not None
    told = proxy is not None and proxy.certificate_header is not None
    sources = "tls.client_ca or identity.proxy.certificate_header"
    rules = (
        (asking and not spiffe, "tls.client_ca: identity.spiffe has to say who clients then are"),
        (told and not spiffe, "identity.proxy.certificate_header: needs identity.spiffe"),
        (spiffe and not (asking or told), f"identity.spiffe: {sources} has to bring certificates"),
    )
    problems = [what for wrong, what in rules if wrong]
    try:
        if tls is not None:
            context(tls)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def context(tls: Tls) -> ssl.SSLContext:
    """The context of the files as they are.

    Raises:
        ConfigError: with every problem.
    """
    problems = _problems(tls)
    if problems:
        raise ConfigError(problems)
    made = _bare()
    try:
        made.load_cert_chain(tls.cert, tls.key, password=lambda: "")
        if tls.client_ca is not None:
            made.load_verify_locations(tls.client_ca)
            required = tls.client == "required"
            made.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    except OSError as error:  # of which SSLError is one
        raise ConfigError(f"tls: {_why(error)}") from error
    return made


def _bare() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_TICKET  # who resumes a session is not verified again
    made.num_tickets = 0
    return made


def _problems(tls: Tls) -> list[str]:
    """What is wrong with each file: the library that serves does not say which one it means."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    problems: list[str] = []

    def read(name: str, path: Path, what: str, parse: Callable[[bytes], Value]) -> Value | None:
        try:
            return parse(path.read_bytes())
        except OSError as error:
            problems.append(f"tls.{name}: {path} can not be read: {_why(error)}")
        except (ValueError, TypeError, UnsupportedAlgorithm):
            problems.append(f"tls.{name}: {path} holds no {what} in PEM")
        return None

    chain = read("cert", tls.cert, "certificates", load_pem_x509_certificates)
    key = read("key", tls.key, "private key without a password", _key(load_pem_private_key))
    if chain and key and not _fit(chain[0], key):
        problems.append(f"tls.key: {tls.key} is not the key of {tls.cert}")
    if tls.client_ca is not None:
        read("client_ca", tls.client_ca, "certificates", load_pem_x509_certificates)
    return problems


def _key(load: Callable[..., Any]) -> Callable[[bytes], Any]:
    return lambda data: load(data, password=None)


def _fit(certificate: Certificate, key: Any) -> bool:
    return bool(certificate.public_key() == key.public_key())


def _why(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)


def _stamps(tls: Tls) -> tuple[object, ...]:
    """What tells whether a file is another than before, behind its links too."""
    paths = (tls.cert, tls.key, tls.client_ca)
    return tuple(_stamp(path) for path in paths if path is not None)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
