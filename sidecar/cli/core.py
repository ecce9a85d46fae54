"""What every mode stands on: OPA, telemetry, audit, pipeline, readiness."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidecar import __version__
from sidecar.cli.podinfo import pod
from sidecar.cli.records import content_of, recorders
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from sidecar.config import Listen, Settings
    from sidecar.opa import DecisionClient, OpaTracing, OwnOpa, Readiness
    from sidecar.pipeline import Pipeline
    from sidecar.protocol.jsonrpc import JsonObject, Strictness
    from sidecar.telemetry import Series, Telemetry

log = logging.getLogger("sidecar")


@dataclass(slots=True)
class Core:
    """What both transports stand on."""

    pipeline: Pipeline
    readiness: Readiness
    telemetry: Telemetry
    stopping: asyncio.Event


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[Core]:
    """OPA, telemetry, audit and pipeline: started in order, ended in reverse."""
    from sidecar import opa, telemetry
    from sidecar.limits import Load
    from sidecar.pipeline import Pipeline
    from sidecar.policy.enforcement import Rules

    async with AsyncExitStack() as stack:
        traces = telemetry.build(
            settings.telemetry,
            version=__version__,
            metrics=settings.admin is not None,
            opa="tcp" if (settings.opa.url or "").startswith("http") else "unix",
            content=content_of(settings.telemetry, settings),
            environ=os.environ,
        )
        stack.callback(traces.shutdown)
        own = await own_opa(settings, stack)
        stack.callback(traces.close)  # OPA ends while the last spans are sent
        decider = opa.DecisionClient(own.url if own else str(settings.opa.url))
        stack.push_async_callback(decider.close)
        how, limits = settings.enforcement, settings.limits
        pipeline = Pipeline(
            decider=decider,
            tracer=traces,
            recorders=await recorders(settings, traces, stack),
            rules=Rules(how.shadow, how.disclose, how.denial),
            version=__version__,
            deadline=settings.opa.deadline,
            listing_deadline=settings.opa.listing_deadline,
            catalog_wait=limits.catalog,
            load=Load(limits.calls_in_flight, limits.calls_per_actor, limits.streams),
            pod=pod(settings.pod),
        )
        readiness = _watched(settings, decider, own, pipeline, stack)
        _observe(traces, pipeline, readiness, settings)
        if settings.admin is not None:
            await _admin(settings, settings.admin, readiness, traces, stack)
        yield Core(pipeline, readiness, traces, stopping())


def _observe(
    traces: Telemetry, pipeline: Pipeline, readiness: Readiness, settings: Settings
) -> None:
    """Have the metrics tell what goes on, and how the policy does."""

    def revision() -> Series:
        known = readiness.revision
        return [] if known is None else [({"authz.policy_revision": known}, 1)]

    def age() -> Series:
        return [] if readiness.revision is None else [({}, readiness.age)]

    traces.observe("authz.calls.active", lambda: pipeline.in_flight)
    traces.observe("authz.streams.active", lambda: pipeline.load.streams)
    traces.observe("authz.ready", lambda: with_servers(readiness.status(), settings)["ready"])
    traces.observe("authz.opa.up", lambda: readiness.error is None)
    traces.observe("authz.policy.info", revision)
    traces.observe("authz.policy.age", age)
    traces.observe("authz.policy.lagging", lambda: readiness.lagging)


def _watched(
    settings: Settings,
    decider: DecisionClient,
    own: OwnOpa | None,
    pipeline: Pipeline,
    stack: AsyncExitStack,
) -> Readiness:
    """Whether OPA decides; whenever it decides by something new, what is open is asked again."""
    from sidecar import opa
    from sidecar.opa.background import Background

    readiness = opa.Readiness(
        decider,
        lambda: opa.question(
            enforcer_version=__version__,
            server=server_names(settings)[0],
            transport="stdio" if settings.mode == "stdio" else "http",
        ),
        settings.opa,
        own=own,
        stamp=None if settings.opa.stamp is None else opa.Stamp(settings.opa.stamp),
        on_change=lambda _revision, _watermark: pipeline.policy_changed(),
    )
    for step, name in ((pipeline.open.step, "rechecking"), (pipeline.lists.step, "relisting")):
        stack.push_async_callback(Background(step, name).stop)
    readiness.start()
    stack.push_async_callback(readiness.stop)
    return readiness


async def own_opa(settings: Settings, stack: AsyncExitStack) -> OwnOpa | None:
    """The OPA of `--policy`, started; None where another one is asked."""
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

    url = settings.telemetry.otlp or _of_traces("ENDPOINT")
    if settings.telemetry.exporter != "otlp" or url is None:
        return None
    return OpaTracing.to(
        url,
        "grpc" if settings.telemetry.protocol == "grpc" else "http",
        authorities=_of_traces("CERTIFICATE"),
        certificate=_of_traces("CLIENT_CERTIFICATE"),
        key=_of_traces("CLIENT_KEY"),
    )


def _of_traces(name: str) -> str | None:
    """An OTLP variable as the SDK reads it: that of traces, else that of every signal."""
    own, common = (os.environ.get(f"OTEL_EXPORTER_OTLP_{of}{name}") for of in ("TRACES_", ""))
    return own or common


async def _admin(
    settings: Settings,
    listen: Listen,
    readiness: Readiness,
    traces: Telemetry,
    stack: AsyncExitStack,
) -> None:
    from sidecar.transport.admin import serve_admin
    from sidecar.transport.app_health import read_probes

    try:
        runner, bound = await serve_admin(
            listen,
            lambda: with_servers(readiness.status(), settings),
            traces.render_metrics,
            read_probes(os.environ.get("POD_APP_PROBES")),
        )
    except OSError as error:
        raise ConfigError(f"admin: can not listen on {listen}: {error}") from error
    stack.push_async_callback(runner.cleanup)
    for at in bound:
        log.info("admin on http://%s", at)


def with_servers(status: JsonObject, settings: Settings) -> JsonObject:
    """What `/readyz` says, with the stdio servers in it that can not be had, if there are any."""
    sockets = {each.name: each.socket for each in settings.upstreams if each.socket is not None}
    if not sockets:
        return status
    from sidecar.transport.wrapped import absence

    absent = {name: absence(path) for name, path in sockets.items()}
    missing = {name: why for name, why in absent.items() if why is not None}
    return {**status, "ready": status["ready"] and not missing, "servers": {"missing": missing}}


def stopping() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    return stopping


def strictness(settings: Settings) -> Strictness:
    """How strictly clients' messages are read."""
    from sidecar.protocol.jsonrpc import Strictness

    return Strictness(
        nesting=settings.limits.nesting, big_integers=settings.protocol.big_integers == "pass"
    )


def server_names(settings: Settings) -> list[str]:
    """What the input document calls the servers."""
    return [each.name for each in settings.upstreams] or [settings.server_name]
