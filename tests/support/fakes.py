"""The ports of the pipeline, scripted: who decides, who records, who traces, and the server itself.

A `Stage` is a pipeline between them with one conversation, and does what a transport does: it keeps
what was let through, and gives back each place in the queue.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidecar.conversation import Call, Conversation, Origin, Server, TraceContext, Tracer
from sidecar.errors import AuditError, DecisionError, SidecarError
from sidecar.pipeline import Pipeline
from sidecar.policy import identity
from sidecar.policy.decision import Decision, Reason
from sidecar.policy.enforcement import TRACE_CONTEXT, Delivery, Forward, Outcome, Permitted, Rules
from sidecar.policy.identity import Actor, Principal
from sidecar.protocol.jsonrpc import (
    JsonObject,
    Message,
    Notification,
    Request,
    RequestId,
    Response,
)
from sidecar.protocol.methods import MODERN_REVISION, MethodTable
from sidecar.protocol.session import CLIENT_CAPABILITIES_KEY, VERSION_KEY, Session

ANA = identity.static(Principal("human", "ana", "static", groups=("support",)))
ALLOWED = Decision(allow=True, rule="everything", revision="r1")
DENIED = Decision(allow=False, reasons=(Reason("not_granted", "no grant covers it"),))
REVOKED = Decision(allow=False, reasons=(Reason("revoked", "the key was withdrawn"),))

Answer = Decision | DecisionError | Callable[[JsonObject], Decision]


@dataclass(slots=True)
class ScriptedDecider:
    """Answers by the target's name, else with `default`, and remembers what it was asked."""

    default: Answer = ALLOWED
    by_name: dict[str, Answer] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    questions: list[JsonObject] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)

    def hold(self, name: str) -> asyncio.Event:
        """Let the decision about `name` wait until the event is set."""
        return self.held.setdefault(name, asyncio.Event())

    async def decide(
        self, document: JsonObject, *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        self.questions.append(copy.deepcopy(document))
        self.deadlines.append(deadline)
        self.headers.append(headers)
        name = document["target"]["name"]
        if name in self.held:
            await self.held[name].wait()
        answer = self.by_name.get(name, self.default)
        if isinstance(answer, DecisionError):
            raise answer
        return answer if isinstance(answer, Decision) else answer(document)

    @property
    def asked_about(self) -> list[str]:
        """The names of the targets that it was asked about."""
        return [each["target"]["name"] for each in self.questions]


@dataclass(slots=True)
class RecordingRecorder:
    """Keeps what it is told; `broken` is an audit that can not write decisions."""

    broken: bool = False
    decided_calls: list[Call] = field(default_factory=list)
    verdicts: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    finished_calls: list[Call] = field(default_factory=list)

    def decided(self, call: Call) -> None:
        self.decided_calls.append(call)
        codes = tuple(each.code for each in call.reasons)
        self.verdicts.append((call.operation.message.method, call.verdict, codes))
        if self.broken:
            raise AuditError("the disk is full")

    def finished(self, call: Call) -> None:
        self.finished_calls.append(call)

    @property
    def ends(self) -> list[tuple[str, str | None]]:
        """Method and outcome of what ended, in order."""
        return [(each.operation.message.method, each.outcome) for each in self.finished_calls]


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CARRIER = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}


@dataclass(slots=True)
class NullTracer:
    """Traces nothing; gives `carrier` as the context to hand on."""

    carrier: Mapping[str, str] = field(default_factory=lambda: dict(CARRIER))
    began_with: list[tuple[Mapping[str, object], Mapping[str, str]]] = field(default_factory=list)
    malformed_codes: list[str] = field(default_factory=list)

    def begin(
        self,
        meta: Mapping[str, object],
        headers: Mapping[str, str],
        cause: TraceContext | None = None,
    ) -> TraceContext:
        self.began_with.append((meta, headers))
        return TraceContext(TRACE_ID, dict(self.carrier), dict(self.carrier))

    def malformed(self, code: str) -> None:
        self.malformed_codes.append(code)


@dataclass(slots=True)
class MemoryServer:
    """A server that is asked in memory: it lists `pages` of tools, and knows what it was asked."""

    pages: Sequence[Sequence[JsonObject]] = ((),)
    error: SidecarError | JsonObject | None = None
    held: asyncio.Event | None = None
    asked: list[Request] = field(default_factory=list)

    async def ask(self, permitted: Permitted) -> Response:
        """Answer the sidecar's own `tools/list`."""
        assert isinstance(permitted, Permitted)
        request = permitted.message
        assert isinstance(request, Request)
        self.asked.append(request)
        if self.held is not None:
            await self.held.wait()
        if isinstance(self.error, SidecarError):
            raise self.error
        if self.error is not None:
            return Response(request.id, error=self.error)
        cursor = (request.params or {}).get("cursor")
        return Response(request.id, result=page_of(self.pages, cursor))


def page_of(pages: Sequence[Sequence[JsonObject]], cursor: object = None) -> JsonObject:
    """One page of `tools/list`: the cursor is the number of the page."""
    number = int(cursor) if isinstance(cursor, str) else 0
    result: JsonObject = {"tools": list(pages[number])}
    if number + 1 < len(pages):
        result["nextCursor"] = str(number + 1)
    return result


def tool(name: str, **more: Any) -> JsonObject:
    """A listed tool."""
    return {"name": name, "inputSchema": {"type": "object"}, **more}


def call_tool(name: str, request_id: RequestId = 1, **arguments: Any) -> Request:
    """A call of a handshake revision."""
    return Request(request_id, "tools/call", {"name": name, "arguments": arguments})


def modern(
    method: str, request_id: RequestId = 1, /, version: str = MODERN_REVISION, **params: Any
) -> Request:
    """A request with its envelope."""
    meta = {VERSION_KEY: version, CLIENT_CAPABILITIES_KEY: {}, **params.pop("_meta", {})}
    return Request(request_id, method, {**params, "_meta": meta})


def plain(message: Message | None) -> Message | None:
    """The message without the trace context that the sidecar adds."""
    if not isinstance(message, (Request, Notification)) or message.params is None:
        return message
    meta = message.params.get("_meta")
    if not isinstance(meta, dict):
        return message
    rest = {key: value for key, value in meta.items() if key not in TRACE_CONTEXT}
    params = {**message.params, "_meta": rest}
    if not rest:
        del params["_meta"]
    if isinstance(message, Request):
        return Request(message.id, message.method, params)
    return Notification(message.method, params)


class Stage:
    """A pipeline, a conversation, and everybody around them."""

    def __init__(
        self,
        answer: Answer = ALLOWED,
        *,
        rules: Rules | None = None,
        tools: Sequence[Sequence[JsonObject]] = ((),),
        lasting: bool = True,
        actor: Actor = ANA,
        tracer: Tracer | None = None,
        **options: Any,
    ) -> None:
        self.decider = ScriptedDecider(answer)
        self.recorder = RecordingRecorder()
        self.tracer = NullTracer()
        self.server = MemoryServer(tools)
        self.pipeline = Pipeline(
            decider=self.decider,
            tracer=tracer or self.tracer,
            recorders=(self.recorder,),
            rules=rules or Rules(),
            version="0.0.0",
            **options,
        )
        session = Session(MethodTable.of(["acme/reindex"]))
        self.conversation = Conversation(session, Server("tickets"), "stdio", lasting)
        self.origin = Origin(actor, "10.1.2.3")
        self.sent: list[Message] = []
        self.calls: list[Call] = []

    async def send(self, message: Message) -> Outcome:
        """From the client; what is let through is in `sent`, in the order of leaving."""
        outcome, ticket, call = await self.pipeline.from_client(
            self.conversation, message, self.origin, self.server.ask
        )
        if isinstance(outcome, Forward):
            self.sent.append(outcome.permitted.message)
        if ticket is not None:
            ticket.release()
        if call is not None:
            self.calls.append(call)
        return outcome

    def deliver(self, message: Message) -> Awaitable[Delivery]:
        """From the server."""
        return self.pipeline.from_server(self.conversation, message, self.origin)

    async def exchange(self, request: Request, result: Any) -> Delivery:
        """A request that is let through, and the server's answer to it."""
        assert isinstance(await self.send(request), Forward)
        return await self.deliver(Response(request.id, result=result))

    async def shake_hands(self, version: str = "2025-11-25") -> None:
        """`initialize`, its answer, and `notifications/initialized`."""
        hello = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "c"}}
        await self.exchange(Request("hello", "initialize", hello), {"protocolVersion": version})
        await self.send(Notification("notifications/initialized"))
        self.sent.clear()

    @property
    def sent_methods(self) -> list[str]:
        """The methods of what was let through."""
        return [each.method for each in self.sent if not isinstance(each, Response)]
