"""What a client has to know before it has a token (RFC 9728, protected resource metadata).

Where the sidecar verifies tokens and knows the URL that clients dial, the document is its own. Else
it is the server's: it is asked for it and its answer goes on untouched. `resource` in it has to be
the URL that clients dial, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit, urlunsplit

from aiohttp import web
from multidict import CIMultiDict

from sidecar.errors import UpstreamError
from sidecar.protocol.jsonrpc import dump_json
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


class Metadata(Protocol):
    """The document of one resource."""

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a request for it, which needs no token."""


class OwnMetadata:
    """The sidecar's word: whose tokens are good here."""

    def __init__(self, resource: str, issuers: Sequence[str], scopes: Sequence[str]) -> None:
        self.url = well_known_url(resource)
        self._document = {
            "resource": resource,
            "authorization_servers": [*issuers],
            **({"scopes_supported": [*scopes]} if scopes else {}),
            "bearer_methods_supported": ["header"],
        }

    async def answer(self, request: web.Request) -> web.Response:
        """The document."""
        if request.method != "GET":
            return web.Response(status=405, headers={"Allow": "GET"})
        return web.json_response(body=dump_json(self._document))


class ServersMetadata:
    """The document of one server, as the server says it."""

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
