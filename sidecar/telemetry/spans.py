"""The spans of a call: ids when it arrives, spans when its outcome is known.

::

    the caller's span (`_meta`, else HTTP; when both, HTTP's is a link; else that of the cause)
    └── SERVER  tools/call NAME
        ├── CLIENT  policy.evaluate mcp/authz     when the policy was asked; OPA's own is below it
        └── CLIENT  tools/call NAME               when it was forwarded; the server's is below it

An exported span is the SDK's record of a finished span, made here: a tracer makes ids of its own
when a span begins, and takes eight times as long. The name of a tool or prompt is in a span's name
only when it is known or vouched for (`attributes.Names`); the attribute has it as it was asked for.

Sources: OpenTelemetry, GenAI, "MCP" (span names, kinds, context propagation); W3C Trace Context.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, NamedTuple

from sidecar.conversation import Call, TraceContext
from sidecar.recording import NO_CONTENT, Content
from sidecar.telemetry import attributes
from sidecar.telemetry.attributes import OTHER, RULESET, Names, Where
from sidecar.telemetry.tracecontext import Remote, headers

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Link, SpanContext, Status, TraceState

OpaTransport = Literal["unix", "tcp"]
Export = Callable[[list["ReadableSpan"]], None]

_ALL = 2**64


class Ids(NamedTuple):
    """The spans of a call by their ids (hex); whether it is exported though nothing happened."""

    parent: Remote | None
    links: tuple[Remote, ...]
    server: str
    policy: str
    upstream: str
    chosen: bool
    opa: OpaTransport
    content: Content = NO_CONTENT


class Spans:
    """Makes ids, and later the spans to them."""

    def __init__(
        self,
        export: Export,
        resource: Resource,
        *,
        ratio: float,
        version: str,
        opa: OpaTransport,
        content: Content = NO_CONTENT,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._otel, self._span = trace, ReadableSpan
        self._scope = InstrumentationScope("sidecar", version)
        self._sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._unset = trace.Status(trace.StatusCode.UNSET)
        self._export, self._resource, self._opa = export, resource, opa
        self._content = content
        self._threshold = int(ratio * _ALL)
        self._key = os.urandom(32)
        self._names = Names()

    def begin(
        self,
        parent: Remote | None,
        link: Remote | None,
        baggage: str | None,
        cause: TraceContext | None = None,
    ) -> TraceContext:
        """New ids below the caller's span, else below the SERVER span of what caused it.

        The sampled flag says what is certain: this trace is exported whatever the outcome. OPA gets
        no baggage, which it would not read.
        """
        links = () if link is None else (link,)
        if cause is not None and isinstance(cause.state, Ids):
            before = _server_span(cause, cause.state)
            parent = parent or before
            if parent.trace_id != before.trace_id:
                links = (*links, before)
        ids = os.urandom(40).hex()
        trace_id, state = (parent.trace_id, parent.tracestate) if parent else (ids[:32], None)
        server, policy, upstream = ids[32:48], ids[48:64], ids[64:]
        chosen = self._chooses(trace_id)
        # No other flag: readers of version 00 may refuse one that they do not know.
        flags = "01" if chosen else "00"
        return TraceContext(
            trace_id=trace_id,
            to_opa=headers(f"00-{trace_id}-{policy}-{flags}", state),
            to_upstream=headers(f"00-{trace_id}-{upstream}-{flags}", state, baggage),
            state=Ids(parent, links, server, policy, upstream, chosen, self._opa, self._content),
        )

    def record(self, call: Call) -> None:
        """Export the spans of a call that was chosen, or that was not simply allowed and done."""
        ids = call.trace.state
        simple = call.verdict == "allow" and call.outcome == "success" and call.rpc_error is None
        if isinstance(ids, Ids) and (ids.chosen or not simple):
            self._export(list(self._spans(call, ids)))

    def _chooses(self, trace_id: str) -> bool:
        """By a keyed hash: a client can craft a trace id, never the choice."""
        if self._threshold >= _ALL:
            return True
        digest = blake2b(trace_id.encode(), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest) < self._threshold

    def _spans(self, call: Call, ids: Ids) -> Iterator[ReadableSpan]:
        name, end = self._name(call), call.finished
        server = self._context(call, ids.server)
        parent = self._remote(ids.parent) if ids.parent else None
        yield self._one(call, "server", name, (server, parent), (call.received, end))
        if call.asked:
            policy, answered = self._context(call, ids.policy), call.answered or end
            question = f"policy.evaluate {RULESET}"
            yield self._one(call, "policy", question, (policy, server), (call.asked, answered))
        if call.forwarded:
            upstream = self._context(call, ids.upstream)
            times = attributes.upstream_times(call)
            yield self._one(call, "upstream", name, (upstream, server), times)

    def _one(
        self,
        call: Call,
        where: Where,
        name: str,
        context: tuple[SpanContext, SpanContext | None],
        times: tuple[int, int],
    ) -> ReadableSpan:
        """One finished span. It never ends before it starts, though a clock may be set back."""
        kind, fields = self._otel.SpanKind, attributes.of(call, where)
        return self._span(
            name,
            context=context[0],
            parent=context[1],
            resource=self._resource,
            attributes=fields,
            links=self._links(call) if where == "server" else (),
            kind=kind.SERVER if where == "server" else kind.CLIENT,
            status=self._status(call, where) if "error.type" in fields else self._unset,
            start_time=times[0],
            end_time=max(times),
            instrumentation_scope=self._scope,
        )

    def _name(self, call: Call) -> str:
        subject = self._names.tool(call) or self._names.prompt(call)
        method = attributes.method(call)
        return method if subject is None or subject == OTHER else f"{method} {subject}"

    def _status(self, call: Call, where: Where) -> Status:
        """ERROR, described in our own words only: a server's may quote arguments or results."""
        said = ""
        if where == "policy":
            said = "" if call.error is None else str(call.error)
        elif where == "server" and call.outcome in ("denied", "policy_error") and call.rpc_error:
            said = call.rpc_error[1]
        code = self._otel.StatusCode.ERROR
        return self._otel.Status(code, attributes.text(said) if said else None)

    def _links(self, call: Call) -> tuple[Link, ...]:
        links: tuple[Remote, ...] = call.trace.state.links
        return tuple(self._otel.Link(self._remote(each)) for each in links)

    def _context(self, call: Call, span_id: str) -> SpanContext:
        ids: Ids = call.trace.state
        trace_id = int(call.trace.trace_id or "", 16)
        state = self._state(ids.parent)
        return self._otel.SpanContext(trace_id, int(span_id, 16), False, self._sampled, state)

    def _remote(self, remote: Remote) -> SpanContext:
        flags = self._otel.TraceFlags(remote.sampled)
        span_id, state = int(remote.span_id, 16), self._state(remote)
        return self._otel.SpanContext(int(remote.trace_id, 16), span_id, True, flags, state)

    def _state(self, remote: Remote | None) -> TraceState | None:
        if remote is None or remote.tracestate is None:
            return None
        return self._otel.TraceState.from_header([remote.tracestate])


def _server_span(context: TraceContext, ids: Ids) -> Remote:
    """The SERVER span of an action, as others name it."""
    trace_id, state = context.trace_id or "", ids.parent.tracestate if ids.parent else None
    traceparent = f"00-{trace_id}-{ids.server}-{'01' if ids.chosen else '00'}"
    return Remote(traceparent, trace_id, ids.server, ids.chosen, state)
