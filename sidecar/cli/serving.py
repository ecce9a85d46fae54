"""A mode each: stdin and stdout, or HTTP, in front of a server of either kind."""

from __future__ import annotations

import gc
import logging
import shutil
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from sidecar.cli.core import Core, server_names, started, strictness
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from sidecar.config import Settings
    from sidecar.conversation import Server
    from sidecar.transport.exchange import Backend, Route
    from sidecar.transport.metadata import Metadata
    from sidecar.transport.peer import Peer
    from sidecar.transport.upstream import HttpUpstream

log = logging.getLogger("sidecar")


def _calm_garbage_collector() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


async def serve_stdio(settings: Settings) -> int:
    """`mcp-sidecar stdio`, to its end; the exit code."""
    from sidecar.conversation import Server
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.pipes import open_stdin, open_stdout
    from sidecar.transport.stdio import StdioProxy

    async with started(settings) as core, AsyncExitStack() as stack:
        server = Server(server_names(settings)[0])
        proxy = StdioProxy(
            pipeline=core.pipeline,
            peer=await _peer(settings, server, stack),
            server=server,
            table=MethodTable.of(settings.protocol.methods),
            actor=settings.identity.actor,
            strictness=strictness(settings),
            limits=settings.limits,
            stdin=await open_stdin(),
            stdout=await open_stdout(),
        )
        _calm_garbage_collector()
        return await proxy.run(core.stopping)


async def _peer(settings: Settings, server: Server, stack: AsyncExitStack) -> Peer:
    from sidecar.transport.peer import ChildPeer

    if not settings.upstreams:
        from sidecar.transport.child import Child

        return ChildPeer(await Child.start(settings.command), settings.limits.server_message)
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.remote import HttpPeer
    from sidecar.transport.remote_sse import SsePeer

    upstream = await _upstream(settings, settings.upstreams[0].url, stack)
    if settings.upstreams[0].transport == "sse":
        return SsePeer(upstream, settings.limits.connect)
    return HttpPeer(upstream, server.catalog, MethodTable.of(settings.protocol.methods))


async def serve_http(settings: Settings) -> int:
    """`mcp-sidecar http`, until it is told to stop; the exit code."""
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.http import HttpProxy, serve

    assert settings.listen is not None
    async with started(settings) as core, AsyncExitStack() as stack:
        proxy = HttpProxy(
            pipeline=core.pipeline,
            routes=await _routes(settings, core, stack),
            metadata=await _metadata(settings, stack),
            table=MethodTable.of(settings.protocol.methods),
            actor=settings.identity.actor,
            strictness=strictness(settings),
            limits=settings.limits,
            http=settings.http,
            listen=settings.listen,
        )
        try:
            runner, (host, port) = await serve(proxy, settings.listen, settings.limits.drain)
        except OSError as error:
            raise ConfigError(f"listen: can not listen on {settings.listen}: {error}") from error
        for path, server in _served(settings):
            log.info("listening on http://%s:%d%s for %s", host, port, path, server)
        _calm_garbage_collector()
        await core.stopping.wait()
        log.info("stopping: finishing what is in flight")
        proxy.close_streams()
        await runner.cleanup()
        proxy.forget_sessions()
    return 0


async def _routes(settings: Settings, core: Core, stack: AsyncExitStack) -> dict[str, Route]:
    from sidecar.conversation import Server
    from sidecar.transport.exchange import Route, Sessions
    from sidecar.transport.relay import HttpRelay
    from sidecar.transport.sse import SseRelay

    if settings.command:
        return {settings.bridge.path: _bridge(settings, core, stack)}
    routes = {}
    for each in settings.upstreams:
        upstream = await _upstream(settings, each.url, stack)
        sessions = Sessions(settings.limits.sessions)
        backend: Backend = HttpRelay(core.pipeline, upstream)
        if each.transport == "sse":
            backend = SseRelay(core.pipeline, upstream, sessions, settings.limits)
        routes[each.path] = Route(backend, Server(each.name), sessions)
    return routes


async def _metadata(settings: Settings, stack: AsyncExitStack) -> dict[str, Metadata]:
    """The metadata of each upstream at its path; of an only one also where no path is named."""
    from sidecar.transport.metadata import Metadata, well_known_path, well_known_url

    wanted = {well_known_path(each.path): well_known_url(each.url) for each in settings.upstreams}
    if len(settings.upstreams) == 1:
        origin = urljoin(settings.upstreams[0].url, "/")
        wanted.setdefault(well_known_path("/"), well_known_url(origin))
    return {path: Metadata(await _upstream(settings, url, stack)) for path, url in wanted.items()}


async def _upstream(settings: Settings, url: str, stack: AsyncExitStack) -> HttpUpstream:
    from sidecar.transport.upstream import HttpUpstream

    upstream = HttpUpstream(
        url,
        connect=settings.limits.connect,
        response=settings.limits.response,
        message_limit=settings.limits.server_message,
    )
    await upstream.start()
    stack.push_async_callback(upstream.stop)
    return upstream


def _bridge(settings: Settings, core: Core, stack: AsyncExitStack) -> Route:
    from sidecar.conversation import Server
    from sidecar.transport.bridge import StdioBridge
    from sidecar.transport.exchange import Route, Sessions
    from sidecar.transport.shared import SharedServer

    command, limits = settings.command, settings.limits
    if shutil.which(command[0]) is None:
        raise ConfigError(f"COMMAND {command[0]!r} can not be started: there is no such program")
    server, shared = Server(settings.server_name), None
    if settings.bridge.shared:
        shared = SharedServer(core.pipeline, command, server, limits)
    bridge = StdioBridge(core.pipeline, command, limits, shared)
    stack.push_async_callback(bridge.stop)
    return Route(bridge, server, Sessions(limits.sessions))


def _served(settings: Settings) -> list[tuple[str, str]]:
    """The paths that are served, and what is behind them. Arguments may be secrets: not shown."""
    if settings.command:
        return [(settings.bridge.path, settings.command[0])]
    return [(each.path, each.url) for each in settings.upstreams]
