"""Everything that a span of ours can carry, as one table.

A row says on which spans an attribute is and where its value comes from: the table is what is
emitted, and a name that has no row is not emitted, but for `authz.x.*`, the policy's own remarks.
Tokens have no row; those of arguments and results are empty unless switched on, and then masked.
The names are those of the OpenTelemetry conventions where they have one (GenAI, "MCP": attributes,
errors; "Recording errors"), else `actor.*` and `authz.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sidecar.conversation import Call
from sidecar.errors import Overloaded, UpstreamError, UpstreamTimeout
from sidecar.policy import masking
from sidecar.policy.decision import Scalar
from sidecar.policy.document import session_digest
from sidecar.policy.enforcement import OVERLOADED
from sidecar.protocol.methods import Direction, Era
from sidecar.recording import NO_CONTENT, Content

Where = Literal["server", "policy", "upstream"]
Value = str | bool | int | float | tuple[str, ...]
Reader = Callable[[Call], Value | None]

RULESET = "mcp/authz"
REMARKS = "authz.x."
OTHER = "_OTHER"

MAX_TEXT = 1024
MAX_ITEMS = 32
MAX_NAME = 128
MAX_NAMES = 200

ASKERS_MISTAKES = frozenset({-32700, -32600, -32601, -32602, -32002})
"""Codes that are no error of a SERVER span (GenAI, "MCP", server span, `error.type`)."""

_UNREACHED = {each.rpc_code: each.code for each in (UpstreamError, UpstreamTimeout)}
_UNANSWERED = {**_UNREACHED, OVERLOADED: Overloaded.code}
"""Codes that the sidecar gives for a server that did not answer, or that there was no room for."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """One row."""

    name: str
    spans: frozenset[Where]
    read: Reader
    note: str


_S: frozenset[Where] = frozenset({"server"})
_P: frozenset[Where] = frozenset({"policy"})
_U: frozenset[Where] = frozenset({"upstream"})


def _target(call: Call, kind: str) -> str | None:
    return next((each.name for each in call.operation.targets if each.type == kind), None)


def tool(call: Call) -> str | None:
    """The tool that was asked for."""
    return _target(call, "tool")


def prompt(call: Call) -> str | None:
    """The prompt that was asked for."""
    return _target(call, "prompt")


def execute_tool(call: Call) -> str | None:
    """`gen_ai.operation.name`: set for tool calls alone."""
    return "execute_tool" if call.operation.message.method == "tools/call" else None


def _over_http(call: Call, where: Where) -> bool:
    """Whether the other end of a span is behind HTTP: who asked of SERVER, who is asked of CLIENT.

    A bridge has a client behind HTTP and its server behind a pipe.
    """
    with_client = (where == "server") == (call.operation.direction is Direction.FROM_CLIENT)
    return call.transport == "http" if with_client else call.server_address is not None


def _transport(where: Where) -> Callable[[Call], str]:
    return lambda call: "tcp" if _over_http(call, where) else "pipe"


def _protocol(where: Where) -> Callable[[Call], str | None]:
    return lambda call: "http" if _over_http(call, where) else None


def _server_address(call: Call) -> tuple[str, int] | None:
    return call.server_address if call.operation.direction is Direction.FROM_CLIENT else None


def server_host(call: Call) -> str | None:
    """`server.address` of the upstream span."""
    address = _server_address(call)
    return None if address is None else address[0]


def server_port(call: Call) -> int | None:
    """`server.port` of the upstream span."""
    address = _server_address(call)
    return None if address is None else address[1]


asker_transport, asker_protocol = _transport("server"), _protocol("server")
asked_transport, asked_protocol = _transport("upstream"), _protocol("upstream")


def status_code(call: Call) -> str | None:
    """The JSON-RPC code that the asker got."""
    return str(call.rpc_error[0]) if call.rpc_error is not None else None


def server_error(call: Call) -> str | None:
    """`error.type` of the SERVER span: the code, unless it is the asker's mistake."""
    if call.rpc_error is not None:
        return None if call.rpc_error[0] in ASKERS_MISTAKES else status_code(call)
    if call.request_id is None:
        return None
    match call.outcome:
        case "tool_error" | "denied":  # a denial without a code was said as an `isError` result
            return "tool_error"
        case "policy_error" | "upstream_error":
            return call.outcome
        case _:
            return None


def reason(call: Call) -> str | None:
    """The first reason's code."""
    return call.reasons[0].code if call.reasons else None


def policy_error(call: Call) -> str | None:
    """`error.type` of the policy span: why no decision came of it. A denial is none.

    A decision that could not be written down counts for nothing: then its reason says so.
    """
    if call.error is not None:
        return call.error.detail
    return reason(call) if call.verdict == "error" else None


def upstream_times(call: Call) -> tuple[int, int]:
    """From when to when a call was with the server.

    A listing is judged by the server's answer: then that is when the answer was there.
    """
    return call.forwarded, call.asked if call.asked > call.forwarded else call.finished


def answered(call: Call) -> bool | None:
    """Whether the server answered a client's request; None where nobody can tell."""
    from_client = call.operation.direction is Direction.FROM_CLIENT
    if not (from_client and call.forwarded and call.request_id is not None):
        return None
    if call.outcome == "upstream_error":
        return upstream_error(call) not in _UNREACHED.values()
    return True if call.outcome in ("success", "tool_error") else None


def upstream_error(call: Call) -> str | None:
    """`error.type` of the upstream span: of a CLIENT span every code is an error."""
    match call.outcome:
        case "tool_error":
            return upstream_code(call) or "tool_error"
        case "upstream_error":
            code = call.rpc_error[0] if call.rpc_error is not None else UpstreamError.rpc_code
            return _UNANSWERED.get(code, str(code))
        case _:
            return None


def upstream_code(call: Call) -> str | None:
    """The code that the other side answered with; not one that stands for no answer."""
    if call.rpc_error is None or call.outcome not in ("tool_error", "upstream_error"):
        return None
    return None if call.rpc_error[0] in _UNANSWERED else status_code(call)


def _resource_uri(call: Call) -> str | None:
    uri = call.operation.params.get("uri")
    about = call.operation.message.method.startswith(("resources/", "notifications/resources/"))
    return uri if about and isinstance(uri, str) else None


def _session(call: Call) -> str | None:
    return session_digest(call.operation.session_id) if call.operation.era is Era.LEGACY else None


def _request_id(call: Call) -> str | None:
    return None if call.request_id is None else str(call.request_id)


def _client_address(call: Call) -> str | None:
    return call.source_address if call.operation.direction is Direction.FROM_CLIENT else None


def _on_behalf_of(call: Call) -> str | None:
    principal = call.actor.on_behalf_of
    return None if principal is None else principal.id


def _chain(call: Call) -> tuple[str, ...]:
    return tuple(f"{each.type}:{each.key}" for each in call.actor.chain)


def _resource(call: Call) -> str | None:
    if call.resource is not None:
        return call.resource
    names = [f"{each.type}:{each.name}" for each in call.operation.targets[:MAX_ITEMS]]
    return ",".join(names) or None


def _content(call: Call) -> Content:
    """What of a tool call's content is recorded."""
    content: Content = getattr(call.trace.state, "content", NO_CONTENT)
    return content if execute_tool(call) else NO_CONTENT


def _arguments(call: Call) -> str | None:
    found = _content(call).arguments_of(call, MAX_TEXT)
    return None if found is None else masking.text(found)


def _result(call: Call) -> str | None:
    found = _content(call).result_of(call, MAX_TEXT)
    return None if found is None else masking.text(found)


def _decided(name: Literal["rule", "owner", "revision", "opa_id"]) -> Reader:
    def read(call: Call) -> str | None:
        value: str | None = getattr(call.decision, name, None)
        return value

    return read


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("mcp.method.name", _S | _U, lambda call: call.operation.message.method, "as sent"),
    Attribute(
        "mcp.protocol.version", _S | _U, lambda call: call.operation.protocol_version, "if known"
    ),
    Attribute("mcp.session.id", _S | _U, _session, "its sha256: the raw one is a key; legacy only"),
    Attribute("mcp.resource.uri", _S | _U, _resource_uri, "of a method about one resource"),
    Attribute("jsonrpc.request.id", _S | _U, _request_id, "as a string; requests"),
    Attribute("gen_ai.operation.name", _S | _U, execute_tool, "execute_tool; tools/call"),
    Attribute("gen_ai.tool.name", _S | _U, tool, "as asked for; tools/call"),
    Attribute("gen_ai.tool.call.arguments", _S | _U, _arguments, "masked JSON; when switched on"),
    Attribute("gen_ai.tool.call.result", _S | _U, _result, "masked JSON; when switched on"),
    Attribute("gen_ai.prompt.name", _S | _U, prompt, "as asked for; prompts/get"),
    Attribute("network.transport", _S, asker_transport, "pipe (stdio) or tcp"),
    Attribute("network.transport", _U, asked_transport, "pipe (stdio) or tcp"),
    Attribute("network.transport", _P, lambda call: str(call.trace.state.opa), "unix or tcp"),
    Attribute("network.protocol.name", _S, asker_protocol, "http, unless stdio"),
    Attribute("network.protocol.name", _U, asked_protocol, "http, unless stdio"),
    Attribute("client.address", _S, _client_address, "where a client's message came from"),
    Attribute("server.address", _U, server_host, "where a server over HTTP is reached"),
    Attribute("server.port", _U, server_port, "where a server over HTTP is reached"),
    Attribute("error.type", _S, server_error, "code, tool_error, policy_error, upstream_error"),
    Attribute("error.type", _P, policy_error, "timeout, connection_error, bad_response, …"),
    Attribute("error.type", _U, upstream_error, "code, tool_error, upstream_failed, …_timeout"),
    Attribute("rpc.response.status_code", _S, status_code, "the code that the asker got"),
    Attribute("rpc.response.status_code", _U, upstream_code, "the code that the server gave"),
    Attribute("security_rule.ruleset.name", _P, lambda call: RULESET, "the policy's package"),
    Attribute("opa.decision_id", _P, _decided("opa_id"), "as in OPA's log, when that is on"),
    Attribute("actor.type", _S | _P, lambda call: call.actor.principal.type, "human, service, …"),
    Attribute("actor.id", _S | _P, lambda call: call.actor.principal.id, "who acts"),
    Attribute("actor.on_behalf_of", _S | _P, _on_behalf_of, "the id of the one it acts for"),
    Attribute("actor.assurance", _S | _P, lambda call: call.actor.assurance, "0 … 3"),
    Attribute("actor.chain", _P, _chain, "type:issuer|id of each, the one that acts first"),
    Attribute("authz.decision", _S | _P, lambda call: call.verdict, "allow, deny, error"),
    Attribute("authz.outcome", _S, lambda call: call.outcome, "success, tool_error, denied, …"),
    Attribute("authz.mode", _S | _P, lambda call: call.mode, "enforce, shadow"),
    Attribute("authz.reason", _S | _P, reason, "the first reason's code"),
    Attribute("authz.reasons", _P, lambda call: tuple(r.code for r in call.reasons), "all codes"),
    Attribute("authz.rule", _S | _P, _decided("rule"), "which rule decided"),
    Attribute("authz.owner", _S | _P, _decided("owner"), "who answers for it"),
    Attribute("authz.resource", _S | _P, _resource, "as mapped, else the targets as type:name,…"),
    Attribute("authz.pinned", _S | _P, lambda call: call.tool_pinned, "as pinned; with pins"),
    Attribute("authz.decision_id", _S | _P, lambda call: call.decision_id, "the sidecar's own"),
    Attribute("authz.policy_revision", _S | _P, _decided("revision"), "of the policy that decided"),
)

_WHERE: tuple[Where, ...] = ("server", "policy", "upstream")
_READERS = {
    where: tuple((row.name, row.read) for row in ATTRIBUTES if where in row.spans)
    for where in _WHERE
}


def of(call: Call, where: Where) -> dict[str, Value]:
    """The attributes of one span of a call. What is absent is an absent key."""
    found: dict[str, Value] = {}
    for name, read in _READERS[where]:
        value = read(call)
        if value is not None and (value := clean(value)) is not None:
            found[name] = value
    if call.decision is not None and call.decision.attributes and where != "upstream":
        found.update(_remarks(call.decision.attributes))
    return found


def _remarks(remarks: Mapping[str, Scalar]) -> Iterator[tuple[str, Value]]:
    for name, remark in remarks.items():
        if (value := clean(remark)) is not None:
            yield text(REMARKS + name[:MAX_NAME]), value


def clean(value: Value) -> Value | None:
    """A value that OTLP can carry, in a bounded size: UTF-8, 64 bits; None for what can't be."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, tuple):
        return tuple(text(each) for each in value[:MAX_ITEMS]) or None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value


def text(value: str) -> str:
    """At most `MAX_TEXT` characters of UTF-8: half a surrogate pair would lose the whole batch."""
    if len(value) > MAX_TEXT:
        value = value[: MAX_TEXT - 1] + "…"
    return value if value.isascii() else value.encode(errors="replace").decode()


class Names:
    """The first so many names of a kind; later ones are `_OTHER`, so that nobody floods a backend.

    Callers choose what they ask for, servers their error codes: neither may make span names or
    metric labels without end.
    """

    def __init__(self, limit: int = MAX_NAMES) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def bound(self, name: str) -> str:
        """The name itself, as UTF-8, or `_OTHER`."""
        if name in self._seen:
            return name
        if len(self._seen) >= self._limit or len(name) > MAX_NAME:
            return OTHER
        name = text(name)
        self._seen.add(name)
        return name

    def tool(self, call: Call) -> str | None:
        """The tool of a call, if the server lists it, or may yet do so and policy vouches."""
        name = tool(call)
        if name is None:
            return None
        vouched = call.tool_known is None and call.verdict == "allow"
        return self.bound(name) if call.tool_known or vouched else OTHER

    def prompt(self, call: Call) -> str | None:
        """The prompt of a call, when policy vouches for it."""
        name = prompt(call)
        if name is None:
            return None
        return self.bound(name) if call.verdict == "allow" else OTHER


def method(call: Call) -> str:
    """A method of the table (or declared in the configuration), else `_OTHER`."""
    row = call.operation.method.name
    return OTHER if row == OTHER else call.operation.message.method
