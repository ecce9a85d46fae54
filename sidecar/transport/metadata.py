"""What a client has to know before it has a token (RFC 9728, protected resource metadata).

The document is the server's own: it is asked for it and its answer goes on untouched. `resource` in
it has to be the URL that clients dial, which is the sidecar's.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit, urlunsplit

from aiohttp import web
from multidict import CIMultiDict

from sidecar.errors import UpstreamError
from sidecar.transport import headers as rules
from sidecar.transport.upstream import HttpUpstream

WELL_KNOWN: Final = "/.well-known/oauth-protected-resource"
MAX_DOCUMENT = 64 * 1024


def well_known_path(path: str) -> str:
    """Where the metadata of the resource at `path` is (RFC 9728 §3.1)."""
    return WELL_KNOWN + path.rstrip("/")


def well_known_url(url: str) -> str:
    """The same for a whole URL."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, well_known_path(parts.path), "", ""))


class Metadata:
    """The document of one server."""

    def __init__(self, upstream: HttpUpstream) -> None:
        self._upstream = upstream

    async def answer(self, request: web.Request) -> web.Response:
        """Pass the server's document on, or its word that there is none.

        Raises:
            UpstreamError: the server can not be reached, redirects, or says too much.
        """
        if request.method != "GET":
            return web.Response(status=405, headers={"Allow": "GET"})
        wanted = CIMultiDict({"Accept": "application/json", "Accept-Encoding": "identity"})
        async with self._upstream.open("GET", wanted) as response:
            body = await self._upstream.read(response)
            if 300 <= response.status < 400 or len(body) > MAX_DOCUMENT:
                raise UpstreamError("the server's metadata is no document", sent=True)
            headers = rules.to_client(response.headers)
            return web.Response(status=response.status, body=body, headers=headers)
