"""A cluster's API server, asked with the token of a service account.

Tokens of accounts are rotated, and so are the authorities that the server is checked by: both files
are read again. What comes back is bounded; what can not be had is said without anything secret.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import aiohttp


class Unreachable(Exception):
    """The API server can not be asked; why, without anything that is secret."""


class ApiServer:
    """Where requests are put, over connections that are kept. `most` is what an answer may have."""

    def __init__(self, url: str, token: Path, authorities: Path | None, most: int) -> None:
        self._url, self._token, self._authorities = url.rstrip("/"), token, authorities
        self._most = most
        self._session: aiohttp.ClientSession | None = None
        self._trust: ssl.SSLContext | bool = True
        self._trusted: tuple[int, ...] | None = None

    async def send(
        self, method: str, path: str, body: bytes | None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            Unreachable: there is none, or more than an answer may have.
        """
        try:
            async with self._open().request(
                method, self._url + path, data=body, headers=self._headers(kind),
                ssl=self._trusting(), allow_redirects=False,
            ) as response:  # fmt: skip
                return response.status, await self._body(response)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            file = getattr(error, "filename", None)
            raise Unreachable(f"{type(error).__name__}{f': {file}' if file else ''}") from error

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False
            )
        return self._session

    def _headers(self, kind: str) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self._token.read_text('ascii').strip()}",
            "Content-Type": kind,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }

    def _trusting(self) -> ssl.SSLContext | bool:
        if self._authorities is not None:
            stat = self._authorities.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp != self._trusted:
                self._trust = ssl.create_default_context(cafile=self._authorities)
                self._trusted = stamp
        return self._trust

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > self._most:
                raise Unreachable(f"its answer has more than {self._most} bytes")
        return bytes(content)
