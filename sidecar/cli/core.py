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
from urllib.parse import urlsplit

from sidecar import __version__
from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from sidecar.config import Listen, Settings
    from sidecar.opa import DecisionClient, OpaTracing, OwnOpa, Readiness
    from sidecar.pipeline import Pipeline
    from sidecar.protocol.jsonrpc import Strictness
    from sidecar.telemetry import Telemetry

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
        own = await own_opa(settings, stack)
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
        readiness = _watched(settings, decider, own, pipeline, stack)
        if settings.admin is not None:
            await _admin(settings.admin, readiness, traces, stack)
        yield Core(pipeline, readiness, traces, stopping())


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
        on_change=lambda _revision, _watermark: pipeline.open.change(),
    )
    asking_again = Background(pipeline.open.step, "rechecking")
    stack.push_async_callback(asking_again.stop)
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


def _pod(settings: Settings) -> dict[str, str]:
    pod = settings.pod
    fields = {
        "name": pod.name,
        "namespace": pod.namespace,
        "service_account": pod.service_account,
    }
    return {key: value for key, value in fields.items() if value is not None}
