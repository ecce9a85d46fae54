"""A mode each: stdin and stdout, or HTTP, in front of a server of either kind."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from sidecar.cli.catalogs import known_server, observe
from sidecar.cli.core import Core, server_names, started, strictness
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from ssl import SSLContext

    from sidecar.config import Settings, Upstream
    from sidecar.conversation import Server
    from sidecar.keys import IssuerKeys
    from sidecar.policy.identity import Actor
    from sidecar.telemetry import Series, Telemetry
    from sidecar.transport.assertion import Assertions
    from sidecar.transport.authentication import Verify
    from sidecar.transport.child import Start
    from sidecar.transport.exchange import Backend, Route
    from sidecar.transport.metadata import Metadata, OwnMetadata
    from sidecar.transport.peer import Peer
    from sidecar.transport.upstream import HttpUpstream

log = logging.getLogger("sidecar")


def _calm_garbage_collector() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


async def serve_stdio(settings: Settings) -> int:
    """`mcp-sidecar stdio`, to its end; the exit code."""
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.pipes import open_stdin, open_stdout
    from sidecar.transport.stdio import StdioProxy

    token = _token_source(settings)
    async with started(settings) as core, AsyncExitStack() as stack:
        pins = next((each.pins for each in settings.upstreams), None)
        server = known_server(settings, server_names(settings)[0], stack, pins)
        observe([server], core.telemetry)
        proxy = StdioProxy(
            pipeline=core.pipeline,
            peer=await _peer(settings, server, stack),
            server=server,
            table=MethodTable.of(settings.protocol.methods),
            who=await _who(settings, token, core, stack),
            strictness=strictness(settings),
            limits=settings.limits,
            stdin=await open_stdin(),
            stdout=await open_stdout(),
        )
        _calm_garbage_collector()
        return await proxy.run(core.stopping)


def _token_source(settings: Settings) -> Callable[[], str | None]:
    """Where the client's token is; before any process of ours could inherit the descriptor."""
    from sidecar.transport.credentials import TokenFile, TokenPipe

    identity = settings.identity
    if identity.token_fd is not None:
        return TokenPipe(identity.token_fd).current
    if identity.token_file is not None:
        return TokenFile(identity.token_file).current
    return lambda: None


async def _who(
    settings: Settings, token: Callable[[], str | None], core: Core, stack: AsyncExitStack
) -> Callable[[], Awaitable[Actor]]:
    """Who the client on our pipe is, asked for each of its messages."""
    identity, verify = settings.identity, await _verify(settings, core, stack)
    if verify is None:

        async def configured() -> Actor:
            return identity.actor

        return configured
    from sidecar.transport.authentication import PipeAuthentication

    return PipeAuthentication(identity, verify, token).actor


async def _peer(settings: Settings, server: Server, stack: AsyncExitStack) -> Peer:
    there = settings.upstreams[0] if settings.upstreams else None
    if there is None or there.socket is not None:
        from sidecar.transport.peer import ChildPeer

        child = await _start(settings, there)()
        return ChildPeer(child, settings.limits.server_message)
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.remote import HttpPeer
    from sidecar.transport.remote_sse import SsePeer

    upstream = await _upstream(settings, there, stack)
    if there.transport == "sse":
        return SsePeer(upstream, settings.limits.connect)
    return HttpPeer(upstream, server.catalog, MethodTable.of(settings.protocol.methods))


def _start(settings: Settings, there: Upstream | None) -> Start:
    """How a stdio server is had: the command's, or one of the shim's behind the socket."""
    from sidecar.transport.child import Child

    if there is not None and there.socket is not None:
        return partial(Child.connect, there.socket)
    return partial(Child.start, settings.command)


async def serve_http(settings: Settings) -> int:
    """`mcp-sidecar http`, until it is told to stop; the exit code."""
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.authentication import Authentication
    from sidecar.transport.http import HttpProxy, serve

    assert settings.listen is not None
    tls = _tls(settings)
    async with started(settings) as core, AsyncExitStack() as stack:
        routes = await _routes(settings, core, stack)
        observe([each.server for each in routes.values()], core.telemetry)
        proxy = HttpProxy(
            pipeline=core.pipeline,
            routes=routes,
            metadata=await _metadata(settings, stack),
            table=MethodTable.of(settings.protocol.methods),
            authentication=Authentication(settings.identity, await _verify(settings, core, stack)),
            strictness=strictness(settings),
            limits=settings.limits,
            http=settings.http,
            listen=settings.listen,
        )
        try:
            runner, bound = await serve(proxy, settings.listen, settings.limits.drain, tls)
        except OSError as error:
            raise ConfigError(f"listen: can not listen on {settings.listen}: {error}") from error
        scheme = "http" if tls is None else "https"
        for at, (path, server) in product(bound, _served(settings)):
            log.info("listening on %s://%s%s for %s", scheme, at, path, server)
        _calm_garbage_collector()
        await core.stopping.wait()
        log.info("stopping: finishing what is in flight")
        proxy.close_streams()
        await runner.cleanup()
        proxy.forget_sessions()
    return 0


def _tls(settings: Settings) -> SSLContext | None:
    """What connections are encrypted with; None where they are not."""
    from sidecar.transport import tls

    tls.check(settings)
    return None if settings.tls is None else tls.Listening(settings.tls)


async def _routes(settings: Settings, core: Core, stack: AsyncExitStack) -> dict[str, Route]:
    from sidecar.transport.callers import AUTHORIZATION, CREDENTIALS
    from sidecar.transport.exchange import Route, Sessions
    from sidecar.transport.relay import HttpRelay
    from sidecar.transport.sse import SseRelay

    if settings.command:
        return {settings.bridge.path: _bridge(settings, None, core, stack)}
    documents = _own_metadata(settings)
    routes = {}
    for each in settings.upstreams:
        if each.socket is not None:
            routes[each.path] = _bridge(settings, each, core, stack)
            continue
        upstream = await _upstream(settings, each, stack)
        sessions = Sessions(settings.limits.sessions)
        server = known_server(settings, each.name, stack, each.pins)
        backend: Backend = HttpRelay(core.pipeline, upstream)
        if each.transport == "sse":
            backend = SseRelay(core.pipeline, upstream, sessions, settings.limits)
        document = documents.get(each.path)
        metadata = document.url if document else None
        credentials = CREDENTIALS - ({AUTHORIZATION} if each.token_file else set())
        asserted = settings.assertion is not None
        routes[each.path] = Route(backend, server, sessions, metadata, credentials, asserted)
    return routes


async def _metadata(settings: Settings, stack: AsyncExitStack) -> dict[str, Metadata]:
    """The metadata of each server at its path; of an only one also where no path is named."""
    from sidecar.transport.metadata import ServersMetadata, well_known_path, well_known_url

    if own := _own_metadata(settings):
        found: dict[str, Metadata] = {well_known_path(path): own[path] for path in own}
        found |= {urlsplit(each.url).path: each for each in own.values()}
        if len(own) == 1:
            found.setdefault(well_known_path("/"), *own.values())
        return found
    asked = [each for each in settings.upstreams if each.socket is None]
    wanted = {
        well_known_path(each.path): replace(each, url=well_known_url(each.url), token_file=None)
        for each in asked
    }
    if len(settings.upstreams) == len(asked) == 1:
        [only] = wanted.values()
        origin = well_known_url(urljoin(asked[0].url, "/"))
        wanted.setdefault(well_known_path("/"), replace(only, url=origin))
    return {
        path: ServersMetadata(await _upstream(settings, there, stack))
        for path, there in wanted.items()
    }


def _own_metadata(settings: Settings) -> dict[str, OwnMetadata]:
    """The documents of what is served here, by path; none where no tokens are verified."""
    from sidecar.transport.metadata import OwnMetadata

    identity, paths = settings.identity, [path for path, _ in _served(settings)]
    if identity.resource is None or not identity.issuers:
        return {}
    issuers = [each.name for each in identity.issuers if each.kind == "oidc"]
    base = identity.resource
    urls = {path: base if len(paths) == 1 else base.rstrip("/") + path for path in paths}
    return {path: OwnMetadata(url, issuers, identity.scopes) for path, url in urls.items()}


async def _verify(settings: Settings, core: Core, stack: AsyncExitStack) -> Verify | None:
    """How tokens are verified; None where they are not. The keys are fetched meanwhile."""
    if not settings.identity.issuers:
        return None
    from sidecar.keys import Authenticator

    authenticator = Authenticator(settings.identity.issuers)
    warming = asyncio.get_running_loop().create_task(authenticator.warm(), name="warm keys")
    stack.push_async_callback(authenticator.close)
    stack.callback(warming.cancel)
    _observe_keys(authenticator.keys, core.telemetry)
    return authenticator.authenticate


def _observe_keys(keys: Mapping[str, IssuerKeys], traces: Telemetry) -> None:
    """Have the metrics tell whether the issuers' keys can be had, and how old they are."""

    def refreshes() -> Series:
        for name, each in keys.items():
            done = {"success": each.refreshes.successes, "failure": each.refreshes.failures}
            for result, count in done.items():
                yield {"authz.issuer": name, "authz.result": result}, count

    def ages() -> Series:
        known = ((name, each.age) for name, each in keys.items())
        return [({"authz.issuer": name}, age) for name, age in known if age is not None]

    traces.observe("authz.keys.refreshes", refreshes)
    traces.observe("authz.keys.age", ages)


async def _upstream(settings: Settings, there: Upstream, stack: AsyncExitStack) -> HttpUpstream:
    from sidecar.transport.credentials import TokenFile
    from sidecar.transport.upstream import HttpUpstream

    upstream = HttpUpstream(
        there.url,
        connect=settings.limits.connect,
        response=settings.limits.response,
        message_limit=settings.limits.server_message,
        token=None if there.token_file is None else TokenFile(there.token_file),
        assertions=_assertions(settings, there),
    )
    await upstream.start()
    stack.push_async_callback(upstream.stop)
    return upstream


def _assertions(settings: Settings, there: Upstream) -> Assertions | None:
    """What signs for the server's requests; None where nothing does."""
    said = settings.assertion
    if said is None:
        return None
    from sidecar.transport.assertion import Assertions, KeyFile

    return Assertions(
        KeyFile(said.key),
        issuer=said.issuer,
        audience=said.audience or there.name,
        lifetime=said.lifetime,
    )


def _bridge(settings: Settings, there: Upstream | None, core: Core, stack: AsyncExitStack) -> Route:
    from sidecar.transport.bridge import StdioBridge
    from sidecar.transport.exchange import Route, Sessions
    from sidecar.transport.shared import SharedServer

    command, limits, start = settings.command, settings.limits, _start(settings, there)
    if command and shutil.which(command[0]) is None:
        raise ConfigError(f"COMMAND {command[0]!r} can not be started: there is no such program")
    name, pins = (settings.server_name, None) if there is None else (there.name, there.pins)
    server, shared = known_server(settings, name, stack, pins), None
    if settings.bridge.shared:
        shared = SharedServer(core.pipeline, start, server, limits)
    bridge = StdioBridge(core.pipeline, start, limits, shared)
    stack.push_async_callback(bridge.stop)
    path = settings.bridge.path if there is None else there.path
    document = _own_metadata(settings).get(path)
    metadata = document.url if document else None
    return Route(bridge, server, Sessions(limits.sessions), metadata)


def _served(settings: Settings) -> list[tuple[str, str]]:
    """The paths that are served, and what is behind them. Arguments may be secrets: not shown."""
    if settings.command:
        return [(settings.bridge.path, settings.command[0])]
    return [(each.path, each.url) for each in settings.upstreams]
