"""The demo's processes, and one actor at a time in front of them.

Everything is started at once, then the actors take turns: what is measured is a call, not how busy
this machine is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema  # noqa: F401 - the client would import it within the first call that is measured
from mcp import Client, MCPError
from opentelemetry.trace import SpanKind, Tracer, format_trace_id

from tests.demo.story import ACTORS, CALL, LIST, PIPED, RESOURCES, STEPS, TYPES, Actor, Step
from tests.support import client as clients
from tests.support.identity import Idp, idp
from tests.support.identity import policy as policy_of
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
PLAYED: dict[Transport, Sequence[Actor]] = {"stdio": PIPED, "http": ACTORS}
DENIED = (-31403, -32601)
LOG = "executed.jsonl"
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
    """Where the demo plays: the desk's log, and how the sidecars are set up and reached."""

    folder: Path
    policy: Path
    otlp: str
    url: str
    issuer: Idp
    tracer: Tracer

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def done(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """What the server executed, by its own log, for each trace."""
        by_trace: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for record in executed(self.log):
            effect = record["name"], record["arguments"]
            by_trace.setdefault(record["trace_id"] or "no trace", []).append(effect)
        return by_trace

    def wrapped(self, actor: Actor) -> list[str]:
        """The command of a desk behind a sidecar that is told who is on the other end."""
        identity = {} if actor.static is None else {"static": actor.static}
        said = _options(self.folder / f"{actor.title}.yaml", self.policy, self.otlp, identity)
        server = desk(self.log, "--otlp", self.otlp)
        return sidecar("stdio", *said, "--admin", "127.0.0.1:0", "--", *server)

    def headers(self, actor: Actor) -> dict[str, str]:
        """A token of theirs, as a client sends it."""
        return {"Authorization": f"Bearer {self.issuer.token(dict(actor.claims))}"}


@contextmanager
def set_up(folder: Path, policy: Path, otlp: str, tracer: Tracer) -> Iterator[Stage]:
    """The ticket desk over HTTP, and in front of it a sidecar that believes one issuer."""
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        server = stack.enter_context(ticket_desk(folder / LOG, "--otlp", otlp))
        identity = {"jwt": [issuer.believed()], "types": TYPES}
        for_its_principals = policy_of(folder, issuer.url, source=policy)
        said = _options(folder / "http.yaml", for_its_principals, otlp, identity)
        front = stack.enter_context(http_sidecar(server.url, *said, env=_environment()))
        yield Stage(folder, policy, otlp, front.url, issuer, tracer)


def _options(file: Path, policy: Path, otlp: str, identity: Mapping[str, Any]) -> list[str]:
    """The sidecar's; JSON is YAML."""
    said = {"identity": identity, "resources": RESOURCES}
    file.write_text(json.dumps(said), encoding="utf-8")
    return ["--config", str(file), "--policy", str(policy), "--otlp", otlp]


def _environment() -> dict[str, str]:
    return environment(MCP_SIDECAR_SERVER__NAME=DESK)


async def play(
    stage: Stage, progress: Callable[[str], None], settle: Callable[[Sequence[Answer]], None]
) -> list[Answer]:
    """All actors on their transports; nobody begins before everybody is there.

    Nobody leaves before `settle` has returned: until then every process still runs.
    """
    lanes = [(actor, transport) for transport, actors in PLAYED.items() for actor in actors]
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
        headers = stage.headers(actor)
        async with clients.over_http(stage.url, mode, headers=headers) as client:
            yield client
        return
    errors = stage.folder / f"{actor.title}.log"
    async with clients.over_stdio(
        stage.wrapped(actor), mode, env=_environment(), errors=errors
    ) as client:
        found = await asyncio.to_thread(wait_for_line, errors, ADMIN)
        await asyncio.to_thread(wait_ready, found[1])
        yield client


async def _do(
    stage: Stage, client: Client, actor: Actor, transport: Transport, step: Step
) -> Answer:
    """One thing, in a span of the caller's own, which the official client passes on."""
    decision: Literal["allow", "deny", "error"]
    name = f"{actor.title}: {step.title}"
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
