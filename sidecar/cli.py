"""The commands, and the only place where the parts are put together.

What takes long to import is imported by the command that needs it: a stdio wrapper is started anew
for every client.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urljoin, urlsplit

from sidecar import __version__
from sidecar.errors import ConfigError, PolicyUnusable

if TYPE_CHECKING:
    from sidecar.config import Listen, Mode, Settings
    from sidecar.conversation import Server
    from sidecar.opa import OpaTracing, OwnOpa, Readiness
    from sidecar.pipeline import Pipeline
    from sidecar.telemetry import Telemetry
    from sidecar.transport.exchange import Backend, Route
    from sidecar.transport.metadata import Metadata
    from sidecar.transport.peer import Peer
    from sidecar.transport.upstream import HttpUpstream

    Command = Callable[[Settings], Coroutine[Any, Any, int]]

log = logging.getLogger("sidecar")

CONFIG_FAULT = 125
POLICY_FAULT = 126

LATER = ("shim", "inject", "uninject", "check-inject", "webhook", "policy", "pin", "audit", "tail")
"""Commands that have a name and a place, and are not there yet."""

DESCRIPTION = """\
Decides, per request, what an MCP client may do: every action is put to Open Policy Agent before the
server sees it, and leaves a span and an audit record.
"""
EPILOG = """\
examples:
  mcp-sidecar stdio --policy ./policy --actor agent:support-bot -- python server.py
  mcp-sidecar http --policy ./policy --listen 127.0.0.1:15801 --upstream http://127.0.0.1:8080/mcp
  mcp-sidecar http --policy ./policy --listen 127.0.0.1:15801 -- python server.py
  mcp-sidecar check --policy ./policy

exit codes: 125 configuration or usage, 126 OPA or its policy unusable, else the wrapped command's
"""
OPTIONS_EPILOG = """\
Every option may also be set in the file (--config) or as MCP_SIDECAR_<OPTION>; flags win over the
environment, which wins over the file. OTEL_* variables configure the exporter as usual.
"""
LEGACY = "a path that ends in /sse means legacy HTTP+SSE"


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong usage."""

    def error(self, message: str) -> NoReturn:
        """One screen: what is wrong, and where help is."""
        print(f"mcp-sidecar: {message}\ntry: {self.prog} --help", file=sys.stderr)
        sys.exit(CONFIG_FAULT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        work: Command = {"stdio": _stdio, "http": _http, "check": _check}[options.mode]
        return _run(work(_settings(options)))
    except ConfigError as error:
        for problem in (*error.problems, *_policy_problems(options)):
            print(f"mcp-sidecar: {problem}", file=sys.stderr)
        return CONFIG_FAULT
    except PolicyUnusable as error:
        print(f"mcp-sidecar: {error}", file=sys.stderr)
        return POLICY_FAULT


def _policy_problems(options: argparse.Namespace) -> tuple[str, ...]:
    """What `check` has to say of the policy as well, when the configuration can not be used."""
    from sidecar import config

    if options.mode != "check" or options.policy is None:
        return ()
    tools = ("MCP_SIDECAR_OPA_BIN", "MCP_SIDECAR_CACHE")
    others = ("MCP_SIDECAR_", "OTEL_")
    environ = {
        name: value
        for name, value in os.environ.items()
        if name in tools or not name.startswith(others)
    }
    flags = {"policy": options.policy}
    try:
        settings = config.load(mode="check", flags=flags, environ=environ, read=Path.read_text)
        _run(_check(settings, show=False))
    except (ConfigError, PolicyUnusable) as error:
        return (str(error),)
    return ()


def _parse(arguments: list[str]) -> argparse.Namespace:
    arguments, command = _split_command(arguments)
    if arguments and arguments[0] in LATER:
        print(f"mcp-sidecar: {arguments[0]!r} is not there yet", file=sys.stderr)
        sys.exit(CONFIG_FAULT)
    parser = Parser(
        prog="mcp-sidecar",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mcp-opa-sidecar {__version__}")
    modes = parser.add_subparsers(
        dest="mode", required=True, metavar="COMMAND", parser_class=Parser
    )
    _add_stdio(modes)
    _add_http(modes)
    _add_check(modes)
    _refuse_unknown_command(arguments, parser, tuple(modes.choices))
    options = parser.parse_args(arguments)
    options.command = command
    return options


def _split_command(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before `--`, and the wrapped command behind it."""
    if "--" not in arguments:
        return arguments, ()
    cut = arguments.index("--")
    return arguments[:cut], tuple(arguments[cut + 1 :])


def _refuse_unknown_command(
    arguments: list[str], parser: argparse.ArgumentParser, known: tuple[str, ...]
) -> None:
    if not arguments or arguments[0].startswith("-") or arguments[0] in known:
        return
    near = get_close_matches(arguments[0], known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
    parser.error(f"there is no command {arguments[0]!r}{hint}")


def _add_stdio(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "stdio",
        help="stdin and stdout in front of a stdio server, or of an HTTP server",
        usage="mcp-sidecar stdio [OPTIONS] (-- COMMAND [ARG...] | --upstream URL)",
        description="Stand between the client on stdin and stdout and a server: COMMAND, which is "
        "started, or the one behind HTTP at URL.",
        epilog=OPTIONS_EPILOG,
    )
    parser.add_argument(
        "--upstream", metavar="URL", help=f"an HTTP server's, in place of a COMMAND; {LEGACY}"
    )
    _add_common(parser)


def _add_http(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "http",
        help="HTTP in front of an HTTP server, or of a stdio server",
        usage="mcp-sidecar http [OPTIONS] --listen HOST:PORT "
        "(--upstream URL | -- COMMAND [ARG...])",
        description="Listen for MCP clients and stand between them and the server at URL, or a "
        "server that COMMAND starts, anew for each session, and that is served at /mcp.",
        epilog=OPTIONS_EPILOG,
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="where clients come in")
    parser.add_argument(
        "--upstream", metavar="URL", help=f"the server's endpoint, whose path is served; {LEGACY}"
    )
    _add_common(parser)


def _add_check(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "check",
        help="check configuration, policy and OPA before anything is deployed",
        description="Read the configuration, compile the policy, ask OPA one question, and print "
        "the settings that would be in force. Every problem is shown at once.",
        epilog=OPTIONS_EPILOG,
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these and more")
    parser.add_argument(
        "--policy", metavar="DIR", help="run an own OPA with the library and this folder"
    )
    parser.add_argument(
        "--opa", metavar="URL", help="ask a co-located OPA: http://HOST:PORT or unix:///PATH"
    )
    parser.add_argument(
        "--actor",
        metavar="TYPE:ID",
        help="who is on the other end: human, service or agent, and a name (default: unknown)",
    )
    parser.add_argument(
        "--admin", metavar="HOST:PORT", help="serve /livez, /readyz and /metrics; `off` for none"
    )
    parser.add_argument(
        "--audit",
        metavar="FILE",
        help="append decision and outcome records; `-` is stdout of http, stderr of stdio",
    )
    parser.add_argument("--otlp", metavar="URL", help="send spans to this OTLP collector")
    parser.add_argument(
        "--shadow",
        action="store_true",
        default=None,
        help="record denials and enforce none but revocations",
    )


def _settings(options: argparse.Namespace) -> Settings:
    from sidecar import config, logs

    flags = {name: value for name, value in vars(options).items() if name != "mode"}
    mode: Mode = options.mode
    settings = config.load(
        mode=mode, flags=flags, environ=os.environ, read=lambda path: path.read_text("utf-8")
    )
    logs.set_up(settings.log_format, settings.log_level)
    return settings


@dataclass(slots=True)
class Core:
    """What both transports stand on."""

    pipeline: Pipeline
    readiness: Readiness
    telemetry: Telemetry
    stopping: asyncio.Event


@asynccontextmanager
async def _core(settings: Settings) -> AsyncIterator[Core]:
    """OPA, telemetry, audit and pipeline: started in order, ended in reverse."""
    from sidecar import opa, telemetry
    from sidecar.conversation import Recorder
    from sidecar.limits import Load
    from sidecar.pipeline import Pipeline
    from sidecar.policy.enforcement import Rules

    async with AsyncExitStack() as stack:
        traces = telemetry.build(
            settings.telemetry,
            version=__version__,
            metrics=settings.admin is not None,
            opa="tcp" if (settings.opa.url or "").startswith("http") else "unix",
            environ=os.environ,
        )
        stack.callback(traces.shutdown)
        own = await _own_opa(settings, stack)
        decider = opa.DecisionClient(own.url if own else str(settings.opa.url))
        stack.push_async_callback(decider.close)
        recorders: tuple[Recorder, ...] = (traces,)
        if settings.audit.path is not None:
            from sidecar.audit import Audit

            audit = Audit.open(settings.audit, stream=2 if settings.mode == "stdio" else 1)
            stack.callback(audit.close)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, audit.reopen)
            recorders = (audit, traces)
        how, limits = settings.enforcement, settings.limits
        pipeline = Pipeline(
            decider=decider,
            tracer=traces,
            recorders=recorders,
            rules=Rules(how.shadow, how.disclose, how.denial),
            version=__version__,
            deadline=settings.opa.deadline,
            listing_deadline=settings.opa.listing_deadline,
            catalog_wait=limits.catalog,
            load=Load(limits.calls_in_flight, limits.calls_per_actor, limits.streams),
            pod=_pod(settings),
        )
        traces.observe("authz.calls.active", lambda: pipeline.in_flight)
        readiness = opa.Readiness(
            decider,
            lambda: opa.question(
                enforcer_version=__version__,
                server=_server_names(settings)[0],
                transport="stdio" if settings.mode == "stdio" else "http",
            ),
            settings.opa,
            own=own,
        )
        readiness.start()
        stack.push_async_callback(readiness.stop)
        if settings.admin is not None:
            await _admin(settings.admin, readiness, traces, stack)
        yield Core(pipeline, readiness, traces, _stopping())


async def _own_opa(settings: Settings, stack: AsyncExitStack) -> OwnOpa | None:
    from sidecar import opa

    if settings.opa.policy is None:
        return None
    own = opa.OwnOpa(settings.opa, tracing=_opa_tracing(settings))
    await own.start()
    stack.push_async_callback(own.stop)
    return own


def _opa_tracing(settings: Settings) -> OpaTracing | None:
    """The own OPA sends its spans to the same collector as the sidecar."""
    from sidecar.opa import OpaTracing

    url = settings.telemetry.otlp or os.environ.get(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    )
    if settings.telemetry.exporter != "otlp" or url is None:
        return None
    grpc = settings.telemetry.protocol == "grpc"
    parts = urlsplit(url if "://" in url else f"http://{url}")
    port = parts.port or (4317 if grpc else 4318)
    return OpaTracing(
        f"{parts.hostname}:{port}", "grpc" if grpc else "http", tls=parts.scheme == "https"
    )


async def _admin(
    listen: Listen, readiness: Readiness, traces: Telemetry, stack: AsyncExitStack
) -> None:
    from sidecar.transport.admin import serve_admin

    try:
        runner, (host, port) = await serve_admin(listen, readiness.status, traces.render_metrics)
    except OSError as error:
        raise ConfigError(f"admin: can not listen on {listen}: {error}") from error
    stack.push_async_callback(runner.cleanup)
    log.info("admin on http://%s:%d", host, port)


def _stopping() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    return stopping


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop, with a garbage collector that leaves what start-up made alone."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_interruptible(work))


async def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Undo a start that a signal ends before `_stopping` takes over: nothing is left behind."""
    task, loop, ended = asyncio.current_task(), asyncio.get_running_loop(), list[int]()

    def end(signum: int) -> None:
        if not ended and task is not None:
            task.cancel()
        ended.append(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end, signum)
    try:
        return await work
    except asyncio.CancelledError:
        if not ended:
            raise
        return 128 + ended[0]


def _calm_garbage_collector() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


async def _stdio(settings: Settings) -> int:
    from sidecar.conversation import Server
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.pipes import open_stdin, open_stdout
    from sidecar.transport.stdio import StdioProxy

    async with _core(settings) as core, AsyncExitStack() as stack:
        server = Server(_server_names(settings)[0])
        proxy = StdioProxy(
            pipeline=core.pipeline,
            peer=await _peer(settings, server, stack),
            server=server,
            table=MethodTable.of(settings.protocol.methods),
            actor=settings.identity.actor,
            strictness=_strictness(settings),
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


async def _http(settings: Settings) -> int:
    from sidecar.protocol.methods import MethodTable
    from sidecar.transport.http import HttpProxy, serve

    assert settings.listen is not None
    async with _core(settings) as core, AsyncExitStack() as stack:
        proxy = HttpProxy(
            pipeline=core.pipeline,
            routes=await _routes(settings, core, stack),
            metadata=await _metadata(settings, stack),
            table=MethodTable.of(settings.protocol.methods),
            actor=settings.identity.actor,
            strictness=_strictness(settings),
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


async def _check(settings: Settings, *, show: bool = True) -> int:
    """Start what there is, ask it one question, and show what would be in force."""
    from sidecar import config

    revision = await _asked_once(settings)
    if not show:
        return 0
    print(json.dumps(config.describe(settings), indent=2))
    print(f"fine: OPA decides, policy revision {revision or '(none)'}", file=sys.stderr)
    return 0


async def _asked_once(settings: Settings) -> str | None:
    """Ask OPA the canary question; the revision that it decides by.

    Raises:
        PolicyUnusable: OPA can not be started, or gives no decision.
    """
    from sidecar import opa
    from sidecar.errors import DecisionError

    async with AsyncExitStack() as stack:
        own = await _own_opa(settings, stack)
        decider = opa.DecisionClient(own.url if own else str(settings.opa.url))
        stack.push_async_callback(decider.close)
        question = opa.question(enforcer_version=__version__, server="check", transport="http")
        try:
            decision = await decider.decide(question, deadline=settings.opa.deadline, headers={})
        except DecisionError as error:
            raise PolicyUnusable(f"OPA gives no decision: {error} ({error.detail})") from error
    return decision.revision


def _strictness(settings: Settings) -> Any:
    from sidecar.protocol.jsonrpc import Strictness

    return Strictness(
        nesting=settings.limits.nesting, big_integers=settings.protocol.big_integers == "pass"
    )


def _server_names(settings: Settings) -> list[str]:
    return [each.name for each in settings.upstreams] or [settings.server_name]


def _pod(settings: Settings) -> dict[str, str]:
    pod = settings.pod
    fields = {
        "name": pod.name,
        "namespace": pod.namespace,
        "service_account": pod.service_account,
    }
    return {key: value for key, value in fields.items() if value is not None}
