"""The demo's processes, and one actor at a time in front of them.

Everything is started at once, then the actors take turns: what is measured is a call, not how busy
this machine is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema  # noqa: F401 - the client would import it within the first call that is measured
from mcp import Client, MCPError
from opentelemetry.trace import SpanKind, Tracer, format_trace_id

from tests.demo.story import ACTORS, CALL, LIST, STEPS, Actor, Step
from tests.support import client as clients
from tests.support.processes import (
    ADMIN,
    desk,
    environment,
    executed,
    http_sidecar,
    sidecar,
    ticket_desk,
    wait_for_line,
    wait_ready,
)

Transport = Literal["stdio", "http"]
# One era each, so that both are shown.
MODES: dict[Transport, str] = {"stdio": clients.LEGACY, "http": clients.MODERN}
DENIED = (-31403, -32601)
DESK = "ticket-desk"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller got. `reason` is the first reason code of a denial."""

    actor: Actor
    step: Step
    transport: Transport
    decision: Literal["allow", "deny", "error"]
    reason: str
    milliseconds: float
    trace_id: str
    listed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the demo plays: the desk's log, and the sidecars over HTTP by actor."""

    folder: Path
    policy: Path
    otlp: str
    urls: dict[Actor, str]
    tracer: Tracer

    @property
    def log(self) -> Path:
        return self.folder / "executed.jsonl"

    def done(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """What the server executed, by its own log, for each trace."""
        by_trace: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for record in executed(self.log):
            effect = record["name"], record["arguments"]
            by_trace.setdefault(record["trace_id"] or "no trace", []).append(effect)
        return by_trace

    def options(self, actor: Actor) -> list[str]:
        """The sidecar's options for an actor; a configuration file says who acts for somebody."""
        common = ["--policy", str(self.policy), "--otlp", self.otlp]
        if actor.identity is None:
            return common
        if "on_behalf_of" not in actor.identity:
            return [*common, "--actor", f"{actor.identity['type']}:{actor.identity['id']}"]
        file = self.folder / f"{actor.name}.yaml"  # JSON is YAML
        file.write_text(json.dumps({"identity": {"static": actor.identity}}), encoding="utf-8")
        return [*common, "--config", str(file)]


@contextmanager
def set_up(folder: Path, policy: Path, otlp: str, tracer: Tracer) -> Iterator[Stage]:
    """The ticket desk over HTTP, with a sidecar for each actor in front of it."""
    stage = Stage(folder, policy, otlp, {}, tracer)
    with ExitStack() as stack:
        server = stack.enter_context(ticket_desk(stage.log, "--otlp", otlp))

        def start(actor: Actor) -> str:
            started = http_sidecar(server.url, *stage.options(actor), env=_environment())
            return stack.enter_context(started).url

        with ThreadPoolExecutor(len(ACTORS)) as pool:
            stage.urls.update(zip(ACTORS, pool.map(start, ACTORS), strict=True))
        yield stage


def _environment() -> dict[str, str]:
    return environment(MCP_SIDECAR_SERVER__NAME=DESK)


async def play(
    stage: Stage, progress: Callable[[str], None], settle: Callable[[Sequence[Answer]], None]
) -> list[Answer]:
    """All actors on both transports; nobody begins before everybody is there.

    Nobody leaves before `settle` has returned: until then every process still runs.
    """
    lanes = [(actor, transport) for transport in MODES for actor in ACTORS]
    everybody, turn = asyncio.Barrier(len(lanes)), asyncio.Lock()
    answers: dict[tuple[Actor, Transport], list[Answer]] = {}

    async def lane(actor: Actor, transport: Transport) -> None:
        async with _client(stage, actor, transport) as client:
            if await everybody.wait() == 0:
                progress(f"{len(lanes) * len(STEPS)} requests, one after the other")
            async with turn:
                did = [await _do(stage, client, actor, transport, step) for step in STEPS]
                answers[actor, transport] = did
            if await everybody.wait() == 0:
                await asyncio.to_thread(settle, [each for did in answers.values() for each in did])
            await everybody.wait()

    async with asyncio.TaskGroup() as group:
        for each in lanes:
            group.create_task(lane(*each))
    return [answer for each in lanes for answer in answers[each]]


@asynccontextmanager
async def _client(stage: Stage, actor: Actor, transport: Transport) -> AsyncIterator[Client]:
    mode = MODES[transport]
    if transport == "http":
        async with clients.over_http(stage.urls[actor], mode) as client:
            yield client
        return
    errors = stage.folder / f"{actor.name}.log"
    async with clients.over_stdio(
        _wrapped(stage, actor), mode, env=_environment(), errors=errors
    ) as client:
        found = await asyncio.to_thread(wait_for_line, errors, ADMIN)
        await asyncio.to_thread(wait_ready, found[1])
        yield client


def _wrapped(stage: Stage, actor: Actor) -> Sequence[str]:
    server = desk(stage.log, "--otlp", stage.otlp)
    return sidecar("stdio", *stage.options(actor), "--admin", "127.0.0.1:0", "--", *server)


async def _do(
    stage: Stage, client: Client, actor: Actor, transport: Transport, step: Step
) -> Answer:
    """One thing, in a span of the caller's own, which the official client passes on."""
    decision: Literal["allow", "deny", "error"]
    name = f"{actor.name}: {step.title}"
    with stage.tracer.start_as_current_span(name, kind=SpanKind.CLIENT) as span:
        trace_id = format_trace_id(span.get_span_context().trace_id)
        began = time.perf_counter()
        listed: tuple[str, ...] = ()
        try:
            listed, reason = await _send(client, step)
            decision = "allow"
        except MCPError as error:
            decision = "deny" if error.code in DENIED else "error"
            reason = _reason(error)
        took = (time.perf_counter() - began) * 1000
    return Answer(actor, step, transport, decision, reason, took, trace_id, listed)


async def _send(client: Client, step: Step) -> tuple[tuple[str, ...], str]:
    """What was listed, and what the server complained about."""
    if step.method == LIST:
        return tuple(await clients.tools_of(client)), ""
    if step.method == CALL and step.tool is not None:
        result = await client.call_tool(step.tool, dict(step.arguments))
        return (), f"tool error: {clients.text_of(result)}" if result.is_error else ""
    await clients.ask(client, step.method)
    return (), ""


def _reason(error: MCPError) -> str:
    if isinstance(error.data, dict) and error.data.get("reasons"):
        return str(error.data["reasons"][0]["code"])
    return f"{error.code} {error.message}"
