"""An issuer on loopback: its keys, its discovery document, and ways of serving them badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from aiohttp import web

from tests.support.issuing import Signer, key_set

Mood = Literal["well", "silent", "redirecting", "huge", "failing"]


class IssuerServer:
    """What is served now; `asked` are the paths that were, with the token they were asked with."""

    def __init__(self, *signers: Signer) -> None:
        self.keys = key_set(*signers)
        self.mood: Mood = "well"
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> None:
        """Serve; after a stop at the same port again."""
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Be down."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, request.headers.get("Authorization")))
        match self.mood:
            case "silent":
                await asyncio.sleep(60)
            case "redirecting" if request.path == "/keys":
                raise web.HTTPFound("/elsewhere")
            case "failing":
                raise web.HTTPServiceUnavailable
            case "huge":
                return await _endless(request)
            case _:
                pass
        if request.path == "/.well-known/openid-configuration":
            document = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
            return web.Response(body=json.dumps(document).encode())
        return web.Response(body=self.keys, content_type="application/jwk-set+json")


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65536)


@asynccontextmanager
async def issuer_server(*signers: Signer) -> AsyncIterator[IssuerServer]:
    """An issuer that serves these keys, for as long as the test lasts."""
    server = IssuerServer(*signers)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
