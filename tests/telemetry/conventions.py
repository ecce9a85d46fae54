"""The conventions, written down anew: what a span or a metric may say, must say, and nothing else.

Nothing here is taken from the sidecar's own tables: names, types, kinds, units and levels are those
of the documents, so that a slip in the one is seen in the other. What is the sidecar's own
(`actor.*`, `authz.*`) is here as it is promised to those who search by it.

Sources: OpenTelemetry semantic conventions v1.41.1, "MCP" (`docs/gen-ai/mcp.md`) with the later
text of semantic-conventions-genai on errors and sessions; "Recording errors"; "GenAI".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.otlp import Point, Span

Where = Literal["server", "policy", "upstream"]
Check = Callable[[Mapping[str, Any]], bool]

SERVICE = "mcp-opa-sidecar"
POLICY_SPAN = "policy.evaluate mcp/authz"
OTHER = "_OTHER"
OWN_REMARKS = "authz.x."

REVISIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")
SESSIONLESS = "2026-07-28"

CLIENT_REQUESTS = (
    "initialize",
    "server/discover",
    "ping",
    "tools/list",
    "tools/call",
    "resources/list",
    "resources/templates/list",
    "resources/read",
    "resources/subscribe",
    "resources/unsubscribe",
    "prompts/list",
    "prompts/get",
    "completion/complete",
    "logging/setLevel",
    "subscriptions/listen",
    "tasks/list",
    "tasks/get",
    "tasks/result",
    "tasks/cancel",
    "tasks/update",
)
SERVER_REQUESTS = (
    "sampling/createMessage",
    "elicitation/create",
    "roots/list",
    "ping",
    "tasks/get",
    "tasks/list",
    "tasks/result",
    "tasks/cancel",
)
CLIENT_NOTIFICATIONS = (
    "notifications/initialized",
    "notifications/cancelled",
    "notifications/progress",
    "notifications/roots/list_changed",
    "notifications/tasks/status",
)
SERVER_NOTIFICATIONS = (
    "notifications/message",
    "notifications/tools/list_changed",
    "notifications/prompts/list_changed",
    "notifications/resources/list_changed",
    "notifications/resources/updated",
    "notifications/subscriptions/acknowledged",
    "notifications/tasks",
    "notifications/elicitation/complete",
)
"""They are not judged, and have no span: a stream of them would drown what is."""

STREAMS = ("stream/open", "stream/resume", "stream/close")
"""The sidecar's own: an HTTP stream is an action too, and no message says so."""

VENDOR = "vendor/reindex"
"""A method that the configuration of the run declares."""

REQUESTS = frozenset({*CLIENT_REQUESTS, *SERVER_REQUESTS, VENDOR})
NAMED = frozenset({*REQUESTS, *CLIENT_NOTIFICATIONS, *STREAMS})
ABOUT_A_RESOURCE = frozenset(
    {"resources/read", "resources/subscribe", "resources/unsubscribe"}
    | {"notifications/resources/updated"}
)

ASKERS_MISTAKES = ("-32700", "-32600", "-32601", "-32602", "-32002")
"""No errors of a SERVER span, since July 2026; of a CLIENT span every code is one."""

CODE = r"-?\d+"


def method(said: Mapping[str, Any]) -> str:
    return str(said.get("mcp.method.name"))


def calls_tool(said: Mapping[str, Any]) -> bool:
    return method(said) == "tools/call"


def gets_prompt(said: Mapping[str, Any]) -> bool:
    return method(said) == "prompts/get"


def is_about_a_resource(said: Mapping[str, Any]) -> bool:
    return method(said) in ABOUT_A_RESOURCE


def over_http(said: Mapping[str, Any]) -> bool:
    return bool(said.get("network.transport") == "tcp")


def may_have_a_session(said: Mapping[str, Any]) -> bool:
    return bool(said.get("mcp.protocol.version") != SESSIONLESS)


def was_answered(said: Mapping[str, Any]) -> bool:
    """By OPA, also where the answer could not be written down."""
    return said.get("error.type") in (None, "audit_failed")


def was_denied(said: Mapping[str, Any]) -> bool:
    return bool(said.get("authz.decision") == "deny")


def failed_to_decide(said: Mapping[str, Any]) -> bool:
    return bool(said.get("authz.decision") == "error")


def is_a_clients_request(said: Mapping[str, Any]) -> bool:
    """A server's may be embedded in a result, and then it has no id."""
    return method(said) in {*CLIENT_REQUESTS} - {*SERVER_REQUESTS}


def is_no_notification(said: Mapping[str, Any]) -> bool:
    return not method(said).startswith(("notifications/", "stream/"))


# ── Spans ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class There:
    """When an attribute is: whenever `must` says so, and only when `may` does."""

    must: Check = lambda said: False
    may: Check = lambda said: True


MAYBE, REQUIRED = There(), There(must=lambda said: True)


def exactly(when: Check) -> There:
    return There(must=when, may=when)


@dataclass(frozen=True, slots=True)
class Row:
    """One attribute.

    `values` are all there are, each of which has to be seen; `pattern` is what every value fits.
    """

    name: str
    on: tuple[Where, ...]
    there: There = MAYBE
    type: type = str
    values: tuple[object, ...] = ()
    pattern: str = ""


ALL: tuple[Where, ...] = ("server", "policy", "upstream")
MCP: tuple[Where, ...] = ("server", "upstream")
DECIDED: tuple[Where, ...] = ("server", "policy")

ATTRIBUTES: tuple[Row, ...] = (
    # "MCP": required, or required on a condition.
    Row("mcp.method.name", MCP, REQUIRED),
    Row("jsonrpc.request.id", MCP, There(is_a_clients_request, is_no_notification)),
    Row("gen_ai.tool.name", MCP, exactly(calls_tool)),
    Row("gen_ai.prompt.name", MCP, exactly(gets_prompt)),
    Row("mcp.resource.uri", MCP, exactly(is_about_a_resource)),
    Row("rpc.response.status_code", MCP, pattern=CODE),
    Row("error.type", ("server",), pattern=rf"{CODE}|tool_error|policy_error|upstream_error"),
    Row("error.type", ("upstream",), pattern=rf"{CODE}|tool_error|upstream_(failed|timeout)"),
    # "MCP": recommended.
    Row("gen_ai.operation.name", MCP, exactly(calls_tool), values=("execute_tool",)),
    Row("mcp.protocol.version", MCP),
    Row("mcp.session.id", MCP, There(may=may_have_a_session), pattern=r"sha256:[0-9a-f]{64}"),
    Row("network.transport", MCP, REQUIRED, values=("pipe", "tcp")),
    Row("network.protocol.name", MCP, exactly(over_http), values=("http",)),
    Row("client.address", ("server",), pattern=r"127\.0\.0\.1"),
    Row("server.address", ("upstream",), There(may=over_http), pattern=r"127\.0\.0\.1"),
    Row("server.port", ("upstream",), There(may=over_http), int),
    # "MCP": opt-in, and only where they have been switched on.
    Row("gen_ai.tool.call.arguments", MCP, There(may=calls_tool), pattern=r"\{.*"),
    Row("gen_ai.tool.call.result", MCP, There(may=calls_tool), pattern=r"\{.*"),
    # The question to the policy: a client's span of a remote call, with the general attributes.
    Row("network.transport", ("policy",), REQUIRED, values=("unix", "tcp")),
    Row("security_rule.ruleset.name", ("policy",), REQUIRED, values=("mcp/authz",)),
    Row("opa.decision_id", ("policy",), There(may=was_answered)),
    Row(
        "error.type",
        ("policy",),
        exactly(failed_to_decide),
        values=(
            "connection_error",
            "timeout",
            "server_error",
            "undefined_decision",
            "bad_response",
            "evaluation_error",
            "audit_failed",
        ),
    ),
    # The sidecar's own.
    Row("actor.type", DECIDED, REQUIRED, values=("human", "service", "agent", "unknown")),
    Row("actor.id", DECIDED, REQUIRED),
    Row("actor.on_behalf_of", DECIDED),
    Row("actor.assurance", DECIDED, REQUIRED, int),
    Row("actor.chain", ("policy",), REQUIRED, list),
    Row("authz.decision", DECIDED, REQUIRED, values=("allow", "deny", "error")),
    Row(
        "authz.outcome",
        ("server",),
        REQUIRED,
        values=(
            "success",
            "tool_error",
            "denied",
            "policy_error",
            "upstream_error",
            "cancelled",
        ),
    ),
    Row("authz.mode", DECIDED, REQUIRED, values=("enforce", "shadow")),
    Row("authz.reason", DECIDED, There(must=was_denied), pattern=r"[a-z][a-z0-9_]*"),
    Row("authz.reasons", ("policy",), There(must=was_denied), list),
    Row("authz.rule", DECIDED),
    Row("authz.owner", DECIDED),
    Row("authz.resource", DECIDED),
    Row("authz.pinned", DECIDED, type=bool, values=(True, False)),
    Row("authz.decision_id", DECIDED, REQUIRED, pattern=r"[0-9a-f-]{36}"),
    Row("authz.policy_revision", DECIDED),
)

LEFT_OUT = {
    "jsonrpc.protocol.version": "it is 2.0, which goes without saying",
    "network.protocol.version": "nothing hangs on it",
    "client.port": "nobody is found by it",
}
"""What the convention leaves to us, and we leave out."""

RESOURCE: Mapping[str, str] = {
    "service.name": re.escape(SERVICE),
    "service.version": r"\d+\.\d+\.\d+",
    "service.instance.id": r"[0-9a-f-]{36}",
    "telemetry.sdk.language": "python",
    "telemetry.sdk.name": "opentelemetry",
    "telemetry.sdk.version": r"\d+\.\d+.*",
}
SCOPE = "sidecar"
OPT_IN = ("gen_ai.tool.call.arguments", "gen_ai.tool.call.result")


def where(span: Span) -> Where:
    """Which of the three a span of the sidecar's is."""
    if span.kind == "SERVER":
        return "server"
    return "policy" if span.name == POLICY_SPAN else "upstream"


def faults(span: Span) -> Iterator[str]:
    """What is wrong with one span."""
    yield from _faults_of_name(span)
    yield from _faults_of_status(span)
    yield from _faults_of_attributes(span)
    yield from _faults_of_resource(span.resource)
    if span.scope != SCOPE:
        yield f"scope {span.scope}"
    if span.end < span.start:
        yield "it ends before it starts"
    if span.links and where(span) != "server":
        yield "only a SERVER span has links"


def _faults_of_name(span: Span) -> Iterator[str]:
    """`{mcp.method.name} {target}`; nobody's inventions, for names are few."""
    said, place = span.attributes, where(span)
    if span.kind not in ("SERVER", "CLIENT"):
        yield f"kind {span.kind}"
    if place == "policy":
        return
    about = said.get("gen_ai.tool.name") or said.get("gen_ai.prompt.name")
    names = {method(said), f"{method(said)} {about}"} if method(said) in NAMED else {OTHER}
    if span.name not in names:
        yield f"name {span.name!r} for {method(said)!r}"


def _faults_of_status(span: Span) -> Iterator[str]:
    said = span.attributes
    error, code = said.get("error.type"), said.get("rpc.response.status_code")
    if span.status != ("UNSET" if error is None else "ERROR"):
        yield f"status {span.status} with error.type {error}"
    if span.status_message and error is None:
        yield "only an error is described"
    failed = said.get("authz.outcome", "success") not in ("success", "cancelled")
    if failed and "jsonrpc.request.id" in said and error is None and code not in ASKERS_MISTAKES:
        yield f"{said['authz.outcome']} without error.type"
    match where(span):
        case "server" if code in ASKERS_MISTAKES:
            if error is not None:
                yield f"the asker's mistake {code} is no error of the SERVER span"
        case "server" | "upstream" if code is not None and error != code:
            yield f"error.type is {error} for the code {code}"
        case _:
            pass


def _faults_of_attributes(span: Span) -> Iterator[str]:
    said, rows = span.attributes, {row.name: row for row in ATTRIBUTES if where(span) in row.on}
    for name, value in said.items():
        if (row := rows.get(name)) is not None:
            yield from _faults_of_value(row, value, said)
        elif not (name.startswith(OWN_REMARKS) and where(span) in DECIDED):
            yield f"{name} is not in the table"
    for row in rows.values():
        if row.name not in said and row.there.must(said):
            yield f"{row.name} is missing"


def _faults_of_value(row: Row, value: Any, said: Mapping[str, Any]) -> Iterator[str]:
    if type(value) is not row.type:
        yield f"{row.name} is {type(value).__name__}, not {row.type.__name__}"
    if not row.there.may(said):
        yield f"{row.name} has no place here"
    if row.values and value not in row.values:
        yield f"{row.name} is {value!r}"
    if row.pattern and not re.fullmatch(row.pattern, str(value)):
        yield f"{row.name} is {value!r}, not {row.pattern}"
    if isinstance(value, str) and not 0 < len(value) <= 1024:
        yield f"{row.name} has {len(value)} characters"


def _faults_of_resource(resource: Mapping[str, Any]) -> Iterator[str]:
    for name in {*resource, *RESOURCE}:
        if not re.fullmatch(RESOURCE.get(name, r"\0"), str(resource.get(name, ""))):
            yield f"resource: {name} is {resource.get(name)!r}"


def faults_of_trace(spans: Iterable[Span]) -> Iterator[str]:
    """Each question to the policy, and each request to the other side, is below the one action."""
    spans = list(spans)
    servers = {(each.trace_id, each.span_id) for each in spans if where(each) == "server"}
    ids = [each.span_id for each in spans]
    if len(set(ids)) != len(ids):
        yield "a span came twice"
    for each in spans:
        if where(each) != "server" and (each.trace_id, each.parent_id) not in servers:
            yield f"{each.name} has no SERVER span above it"


def unseen(spans: Iterable[Span]) -> set[str]:
    """What the tables have, and no span had."""
    spans = list(spans)
    missing = set[str]()
    for row in ATTRIBUTES:
        for place in row.on:
            here = [each.attributes for each in spans if where(each) == place]
            values = [each[row.name] for each in here if row.name in each]
            wanted = row.values if place == row.on[0] else ()
            missing |= {
                f"{row.name} = {each!r} on {place}" for each in wanted if each not in values
            }
            if not values:
                missing.add(f"{row.name} on {place}")
    seen = {method(each.attributes) for each in spans if where(each) == "server"}
    return missing | (NAMED - seen)


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────

COUNTER, GAUGE, HISTOGRAM = "monotonic sum", "gauge", "histogram"

OPERATION_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
DECISION_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

NAME = r".{1,128}"
METHODS = "|".join(map(re.escape, sorted({*NAMED, OTHER})))
ACTORS = "human|service|agent|unknown"
DECISIONS = "allow|deny|error"
POLICY_ERRORS = "connection_error|timeout|server_error|undefined_decision|bad_response"


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric: the labels are patterns of all their values, of which `must` are always there."""

    name: str
    kind: str
    unit: str
    labels: Mapping[str, str] = field(default_factory=dict)
    must: frozenset[str] = frozenset()
    bounds: tuple[float, ...] = ()


_OPERATION = {
    "mcp.method.name": METHODS,
    "mcp.protocol.version": "|".join(map(re.escape, (*REVISIONS, OTHER))),
    "gen_ai.operation.name": "execute_tool",
    "gen_ai.tool.name": NAME,
    "gen_ai.prompt.name": NAME,
    "error.type": rf"{CODE}|tool_error|policy_error|upstream_(error|failed|timeout)|{OTHER}",
    "rpc.response.status_code": rf"{CODE}|{OTHER}",
    "network.transport": "pipe|tcp",
    "network.protocol.name": "http",
}
_OPERATION_MUST = frozenset({"mcp.method.name", "network.transport"})
_SERVER = {"authz.server": NAME}


def by_server(name: str, unit: str) -> Instrument:
    return Instrument(name, GAUGE, unit, _SERVER, frozenset(_SERVER))


INSTRUMENTS: tuple[Instrument, ...] = (
    # "MCP", metrics.
    Instrument(
        "mcp.server.operation.duration",
        HISTOGRAM,
        "s",
        _OPERATION,
        _OPERATION_MUST,
        OPERATION_BUCKETS,
    ),
    Instrument(
        "mcp.client.operation.duration",
        HISTOGRAM,
        "s",
        {**_OPERATION, "server.address": r"127\.0\.0\.1", "server.port": r"\d+"},
        _OPERATION_MUST,
        OPERATION_BUCKETS,
    ),
    # The sidecar's own.
    Instrument(
        "authz.decisions",
        COUNTER,
        "{decision}",
        {
            "actor.type": ACTORS,
            "authz.decision": DECISIONS,
            "authz.reason": rf"[a-z_]{{1,64}}|{OTHER}",
            "authz.owner": NAME,
            "authz.mode": "enforce|shadow",
            "gen_ai.tool.name": NAME,
        },
        frozenset({"actor.type", "authz.decision", "authz.mode"}),
    ),
    Instrument(
        "authz.decision.duration",
        HISTOGRAM,
        "s",
        {
            "actor.type": ACTORS,
            "authz.decision": DECISIONS,
            "error.type": f"{POLICY_ERRORS}|evaluation_error|audit_failed",
        },
        frozenset({"actor.type", "authz.decision"}),
        DECISION_BUCKETS,
    ),
    Instrument(
        "authz.messages.malformed",
        COUNTER,
        "{message}",
        {"error.type": r"[a-z_]{1,64}"},
        frozenset({"error.type"}),
    ),
    Instrument("authz.spans.dropped", COUNTER, "{span}"),
    Instrument("authz.audit.failures", COUNTER, "{record}"),
    Instrument("authz.arguments.unchecked", COUNTER, "{call}"),
    Instrument("authz.calls.active", GAUGE, "{call}"),
    Instrument("authz.streams.active", GAUGE, "{stream}"),
    Instrument("authz.ready", GAUGE, "{sidecar}"),
    Instrument("authz.opa.up", GAUGE, "{opa}"),
    by_server("authz.upstream.up", "{server}"),
    Instrument(
        "authz.policy.info",
        GAUGE,
        "{policy}",
        {"authz.policy_revision": NAME},
        frozenset({"authz.policy_revision"}),
    ),
    Instrument("authz.policy.age", GAUGE, "s"),
    Instrument("authz.policy.lagging", GAUGE, "{policy}"),
    Instrument(
        "authz.keys.refreshes",
        COUNTER,
        "{refresh}",
        {"authz.issuer": NAME, "authz.result": "success|failure"},
        frozenset({"authz.issuer", "authz.result"}),
    ),
    Instrument("authz.keys.age", GAUGE, "s", {"authz.issuer": NAME}, frozenset({"authz.issuer"})),
    Instrument("authz.tools.unpinned", GAUGE, "{tool}"),
    by_server("authz.catalog.tools", "{tool}"),
    by_server("authz.catalog.complete", "{catalog}"),
    by_server("authz.catalog.pins", "{pin}"),
)

LEFT_OUT_INSTRUMENTS = {
    "mcp.server.session.duration": "a sidecar does not see every session end",
    "mcp.client.session.duration": "it opens none",
}
NEVER_LABELS = ("mcp.session.id", "jsonrpc.request.id", "mcp.resource.uri", "actor.id")


def faults_of_point(point: Point) -> Iterator[str]:
    """What is wrong with one series."""
    row = next((each for each in INSTRUMENTS if each.name == point.metric), None)
    if row is None:
        yield "it is not in the table"
        return
    if (point.kind, point.unit, point.bounds) != (row.kind, row.unit, row.bounds):
        yield f"{point.kind} in {point.unit!r} with {point.bounds}"
    for name in row.must - set(point.attributes):
        yield f"label {name} is missing"
    for name, value in point.attributes.items():
        if not re.fullmatch(row.labels.get(name, r"\0"), str(value), re.DOTALL):
            yield f"label {name} is {value!r}"
    yield from _faults_of_resource(point.resource)


def unseen_of_points(points: Iterable[Point]) -> set[str]:
    """What the table has, and no series had."""
    points = list(points)
    missing = set[str]()
    for row in INSTRUMENTS:
        found = [each.attributes for each in points if each.metric == row.name]
        missing |= {
            f"label {name} of {row.name}"
            for name in row.labels
            if not any(name in each for each in found)
        }
        if not found:
            missing.add(row.name)
    return missing


def in_prometheus(row: Instrument) -> str:
    """Its name in the Prometheus text ("Prometheus and OpenMetrics Compatibility")."""
    unit = "_seconds" if row.unit == "s" else ""
    return row.name.replace(".", "_") + unit + ("_total" if row.kind == COUNTER else "")
