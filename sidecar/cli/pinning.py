"""`mcp-sidecar pin`: a server's tools written down as they are, or compared with that.

It is a client of its own, and calls no tool: it greets the server, lists its tools, and leaves. The
stateless revision is tried first, as clients do; a server that does not know it is greeted again,
over a connection or by a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any, Literal

from sidecar import __version__
from sidecar.cli.catalogs import load_pins
from sidecar.config.keys import READERS
from sidecar.config.readers import Problems
from sidecar.errors import ConfigError, SidecarError, UpstreamError
from sidecar.learning import listing_params
from sidecar.policy.enforcement import for_catalog
from sidecar.protocol import pins
from sidecar.protocol.catalog import MAX_PAGES, Catalog, read_page
from sidecar.protocol.jsonrpc import JsonObject, Message, Notification, Request, RequestId, Response
from sidecar.protocol.methods import LEGACY, MODERN_REVISION, Era, MethodTable
from sidecar.transport.child import Child
from sidecar.transport.credentials import TokenFile
from sidecar.transport.peer import ChildPeer, Peer
from sidecar.transport.remote import HttpPeer
from sidecar.transport.remote_sse import SsePeer
from sidecar.transport.upstream import HttpUpstream

CHANGED = 1
PROBE = 10.0
"""Seconds that a server has to answer a revision that it may not know."""
PATIENCE = 60.0
"""Seconds that the whole takes at most."""
CONNECT = 5.0
MESSAGE_LIMIT = 64 * 1024 * 1024
SERVER_INFO_KEY = "io.modelcontextprotocol/serverInfo"


async def pin(options: argparse.Namespace) -> int:
    """List the server's tools, and write them as pins, or say how they differ from those of a file.

    Raises:
        ConfigError: the tools can not be listed, or the file can not be read.
    """
    approved = load_pins(Path(options.check)) if options.check else None
    found = await _found(options)
    if approved is None:
        print(pins.write(found), end="")
        return 0
    lines = list(pins.differences(approved, found))
    print("\n".join(lines) if lines else f"unchanged: {len(found.tools)} tools, as pinned")
    return CHANGED if lines else 0


async def _found(options: argparse.Namespace) -> pins.Pins:
    try:
        async with asyncio.timeout(PATIENCE):
            with suppress(UpstreamError, TimeoutError):
                async with _client(options) as client:
                    async with asyncio.timeout(PROBE):
                        await client.discover()
                    return await client.pins()
            async with _client(options) as client:
                await client.initialize()
                return await client.pins()
    except UpstreamError as error:
        raise ConfigError(f"the server's tools can not be listed: {error}") from error
    except TimeoutError as error:
        raise ConfigError(f"the server did not list its tools within {PATIENCE:g} s") from error


@asynccontextmanager
async def _client(options: argparse.Namespace) -> AsyncIterator[_Client]:
    async with AsyncExitStack() as stack:
        peer = await _peer(options, stack)
        reading = asyncio.get_running_loop().create_task(_read(peer))
        try:
            yield _Client(peer)
        finally:
            await peer.stop()
            reading.cancel()
            await asyncio.wait((reading,))


async def _read(peer: Peer) -> None:
    await peer.read(_Nobody())
    peer.fail_asked(UpstreamError("it ended", sent=True))


async def _peer(options: argparse.Namespace, stack: AsyncExitStack) -> Peer:
    if options.command:
        return ChildPeer(await Child.start(options.command), MESSAGE_LIMIT)
    problems = Problems()
    read = problems.read(READERS["upstream"], options.upstream, "--upstream")
    if problems:
        raise ConfigError([f"{where}: {bad}" for where, bad in problems])
    if read[0].socket is not None:
        return ChildPeer(await Child.connect(read[0].socket), MESSAGE_LIMIT)
    upstream = HttpUpstream(
        read[0].url,
        connect=CONNECT,
        response=None,
        message_limit=MESSAGE_LIMIT,
        token=TokenFile(Path(options.token_file)) if options.token_file else None,
    )
    await upstream.start()
    stack.push_async_callback(upstream.stop)
    if read[0].transport == "sse":
        return SsePeer(upstream, CONNECT)
    return HttpPeer(upstream, Catalog(), MethodTable.of())


class _Client:
    """The few messages that it takes; all raise `UpstreamError` when the server will not."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._era, self._server, self._asked = Era.LEGACY, "", 0

    async def discover(self) -> None:
        """Greet the server in the stateless revision."""
        self._era = Era.MODERN
        result = await self._ask("server/discover", self._params())
        versions = result.get("supportedVersions")
        if not isinstance(versions, list) or MODERN_REVISION not in versions:
            raise UpstreamError("it does not know the stateless revision", sent=True)
        meta = result.get("_meta")
        self._call(meta.get(SERVER_INFO_KEY) if isinstance(meta, dict) else None)

    async def initialize(self) -> None:
        """Shake hands."""
        client = {"name": "mcp-opa-sidecar", "version": __version__}
        params = {"protocolVersion": LEGACY[-1], "capabilities": {}, "clientInfo": client}
        result = await self._ask("initialize", params)
        self._call(result.get("serverInfo"))
        greeted = for_catalog(Notification("notifications/initialized"))
        await self._peer.send(greeted, None, lambda: None)

    async def pins(self) -> pins.Pins:
        """All the pages of the server's tools."""
        tools: list[JsonObject] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page, cursor = read_page(await self._ask("tools/list", self._params(cursor)))
            tools += page
            if cursor is None:
                return pins.pin(self._server, tools)
        raise UpstreamError(f"there are more than {MAX_PAGES} pages", sent=True)

    def _call(self, info: Any) -> None:
        name = info.get("name") if isinstance(info, dict) else None
        self._server = name if isinstance(name, str) else ""

    def _params(self, cursor: str | None = None) -> JsonObject:
        return listing_params(self._era, MODERN_REVISION, __version__, cursor)

    async def _ask(self, method: str, params: JsonObject) -> JsonObject:
        self._asked += 1
        request = Request(f"mcp-opa-sidecar-{self._asked}", method, params)
        answer: Response = await self._peer.ask(for_catalog(request))
        if answer.error is not None or not isinstance(answer.result, dict):
            why = (answer.error or {}).get("message", "no object")
            raise UpstreamError(f"{method} is answered with {why!r}", sent=True)
        return answer.result


class _Nobody:
    """Hears what the server says besides its answers, and does nothing about it."""

    async def heard(self, message: Message, frame: bytes) -> None:
        """Nobody asked."""

    async def lost(self, request_id: RequestId, error: UpstreamError) -> None:
        """Nobody waits."""

    def malformed(self, error: SidecarError) -> None:
        """Nobody reads it."""

    async def admits(self, action: Literal["open", "resume", "close"]) -> bool:
        """Streams may be opened."""
        return True

    def holding(
        self, action: Literal["open", "resume"], end: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Nobody closes them."""
        return nullcontext()
