"""Tokens that come from a file or an inherited descriptor: read again, and never shown.

A file is read when it is another than the last one, as rotated secrets are; a descriptor says a
token a line, of which the last one counts. Never an environment variable: a child could read it.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from sidecar.errors import ConfigError

MAX_TOKEN = 16 * 1024

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")


class TokenFile:
    """The token in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._token: str | None = None

    def current(self) -> str | None:
        """What is in the file now; None when there is no file, or nothing in it."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen != self._seen:
                with self._path.open("rb") as file:
                    self._token = _text(file.read(MAX_TOKEN + 2))
                self._seen = seen
        except OSError:
            self._seen = self._token = None
        return self._token


class TokenPipe:
    """The tokens that an inherited descriptor says. No child of ours gets it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest, self._ended = b"", False
        self._token: str | None = None
        try:
            os.set_inheritable(descriptor, False)
            os.set_blocking(descriptor, False)
        except OSError as error:
            raise ConfigError(f"identity.token_fd: {descriptor} can not be read") from error

    def current(self) -> str | None:
        """The token that was said last; None when none was."""
        with suppress(BlockingIOError):
            while not self._ended:
                self._take(os.read(self._descriptor, MAX_TOKEN))
        return self._token

    def _take(self, data: bytes) -> None:
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended and self._rest:  # the last line needs no end
            lines.append(self._rest)
        for line in lines:
            self._token = _text(line) or self._token
        self._rest = self._rest[: MAX_TOKEN + 1]


def fits_a_header(token: str) -> bool:
    """Whether this is what a bearer token looks like (RFC 6750 §2.1), and no more."""
    return len(token) <= MAX_TOKEN and _TOKEN.fullmatch(token) is not None


def _text(content: bytes) -> str | None:
    return content.decode("ascii", "replace").strip() or None
