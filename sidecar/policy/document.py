"""The question: an operation and its actor as the input document, version 1.

The only place that names the document's keys. Its normative form is
`policies/schemas/input.schema.json`, and a test holds this code to it. Tokens, cookies, raw headers
and results never get here.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from sidecar.policy.identity import Actor, Principal
from sidecar.protocol.catalog import Lookup, Named, Tool, digest, is_pinned
from sidecar.protocol.jsonrpc import JsonObject
from sidecar.protocol.methods import Listing
from sidecar.protocol.session import Operation, Target

VERSION = 1
OBLIGATIONS: tuple[str, ...] = ()
"""The obligations that this sidecar can meet; a decision with another one denies."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and when: what the document says besides the message and its actor.

    `time` is RFC 3339 in UTC. `unverified` are HTTP headers that the configuration lets the policy
    see, whatever the client wrote into them. `pod` holds `name`, `namespace`, `service_account` and
    `labels` where known.
    """

    enforcer_version: str
    server: str
    transport: str
    time: str
    source_address: str | None = None
    trace_id: str | None = None
    pod: Mapping[str, Any] = field(default_factory=dict)
    unverified: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """What is remembered of a task: the tool that made it, and the chain that owns it."""

    tool: str
    owner: tuple[str, ...]


NOTHING_KNOWN = Lookup(None)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the sidecar itself knows about the target.

    `known` is whether the server lists a resource or prompt, None when that can't be told.
    `resource` is what a tool acts on, where that is mapped and its arguments say it.
    `arguments_valid` is whether they are what its schema says, None where that is not asked, or
    can't be told. `round` is the number of the round of a multi-round request, from 2 on; None for
    a plain one.
    """

    tool: Lookup = NOTHING_KNOWN
    known: bool | None = None
    resource: str | None = None
    arguments_valid: bool | None = None
    task: Task | None = None
    round: int | None = None


NO_FACTS = Facts()


def build(
    operation: Operation,
    target: Target,
    actor: Actor,
    environment: Environment,
    facts: Facts = NO_FACTS,
) -> JsonObject:
    """The input document for one operation on one target."""
    document = _common(operation, target, actor, environment)
    kind = _OBJECTS.get(target.type)
    if kind is not None:
        document[target.type] = kind(operation, target, facts)
    if target.kind == "task":
        document["task"] = _task(operation, target, facts)
    if facts.round is not None:
        responses = operation.params.get("inputResponses")
        document["round"] = {
            "n": facts.round,
            "input_responses": responses if isinstance(responses, dict) else {},
        }
    return document


def build_listing(
    operation: Operation,
    listing: Listing,
    items: list[JsonObject],
    actor: Actor,
    environment: Environment,
    *,
    tasks: Mapping[str, Task],
    pins: Mapping[str, str] | None = None,
) -> JsonObject:
    """The input document for one page of a listing's answer; `tasks` are those remembered."""
    slim = [_slim(listing, each, tasks, pins) for each in items]
    return _listing(operation, listing, slim, actor, environment)


def build_relisting(
    operation: Operation,
    listing: Listing,
    entries: Iterable[Named],
    actor: Actor,
    environment: Environment,
    *,
    pins: Mapping[str, str] | None = None,
) -> JsonObject:
    """The same question about what the catalog has, as it was put about the answer."""
    slim = [_slim_entry(listing, each, pins) for each in entries]
    return _listing(operation, listing, slim, actor, environment)


def _listing(
    operation: Operation,
    listing: Listing,
    items: list[JsonObject],
    actor: Actor,
    environment: Environment,
) -> JsonObject:
    document = _common(operation, Target("listing", listing.kind), actor, environment)
    document["listing"] = {"kind": listing.kind, "items": items}
    return document


def canary(environment: Environment, actor: Actor) -> JsonObject:
    """The readiness question: a listing by nobody, marked as no real action."""
    document: JsonObject = {
        "version": VERSION,
        "canary": True,
        "enforcer": {"version": environment.enforcer_version, "obligations": list(OBLIGATIONS)},
        "actor": _actor(actor),
        "mcp": {
            "method": "tools/list",
            "kind": "request",
            "direction": "client_to_server",
            "era": "modern",
            "transport": environment.transport,
        },
        "target": {"type": "listing", "name": "tools"},
        "listing": {"kind": "tools", "items": []},
        "server": {"name": environment.server},
        "context": _context(environment, actor),
    }
    return document


def _common(
    operation: Operation, target: Target, actor: Actor, environment: Environment
) -> JsonObject:
    return {
        "version": VERSION,
        "enforcer": {"version": environment.enforcer_version, "obligations": list(OBLIGATIONS)},
        "actor": _actor(actor),
        "mcp": _mcp(operation, environment),
        "target": {"type": target.type, "name": target.name},
        "server": {"name": environment.server},
        "context": _context(environment, actor),
    }


def _actor(actor: Actor) -> JsonObject:
    value = {
        **_principal(actor.principal),
        "assurance": actor.assurance,
        "sources": list(actor.sources),
        "chain": [_principal(each) for each in actor.chain],
    }
    if actor.on_behalf_of is not None:
        value["on_behalf_of"] = _principal(actor.on_behalf_of)
    if actor.token is not None:
        token = actor.token
        value["token"] = _present(
            id=token.id, issued_at=token.issued_at, expires_at=token.expires_at
        )
    return value


def _principal(principal: Principal) -> JsonObject:
    return {
        "type": principal.type,
        "id": principal.id,
        "issuer": principal.issuer,
        "key": principal.key,
        "groups": list(principal.groups),
        "scopes": list(principal.scopes),
        "claims": dict(principal.claims),
    }


def _mcp(operation: Operation, environment: Environment) -> JsonObject:
    client = operation.client
    return _present(
        method=operation.message.method,
        kind=operation.method.kind,
        direction=operation.direction.value,
        era=operation.era.value,
        protocol_version=operation.protocol_version,
        transport=environment.transport,
        session=session_digest(operation.session_id),
        claimed_client=_present(name=client.name, version=client.version) if client else None,
    )


def _context(environment: Environment, actor: Actor) -> JsonObject:
    return _present(
        time=environment.time,
        source_address=environment.source_address,
        purpose=actor.purpose,
        pod=dict(environment.pod) or None,
        unverified={"headers": dict(environment.unverified)},
        trace_id=environment.trace_id,
    )


def session_digest(session_id: str | None) -> str | None:
    """A session id as it may be shown: the raw one is a key."""
    if session_id is None:
        return None
    return "sha256:" + hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()


def _tool(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    lookup, task = facts.tool, operation.params.get("task")
    return _present(
        name=target.name,
        arguments=_arguments(operation),
        annotations=dict(lookup.tool.annotations) if lookup.tool else {},
        known=lookup.known,
        digest=lookup.tool.digest if lookup.tool else None,
        pinned=lookup.pinned,
        resource=facts.resource,
        arguments_valid=facts.arguments_valid,
        task=task if isinstance(task, dict) else None,
    )


def _prompt(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    return _present(name=target.name, arguments=_arguments(operation), known=facts.known)


def _completion(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    argument = operation.params.get("argument")
    return {
        "ref": operation.params["ref"],
        "argument": argument if isinstance(argument, dict) else {},
    }


def _task(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    return _known_task(target.name, facts.task)


def _known_task(task_id: str, task: Task | None) -> JsonObject:
    if task is None:
        return {"id": task_id, "known": False}
    return {"id": task_id, "known": True, "tool": task.tool, "owner": list(task.owner)}


def _sampling(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    tools, tokens = operation.params.get("tools"), operation.params.get("maxTokens")
    offered = tools if isinstance(tools, list) else []
    names = [each.get("name") for each in offered if isinstance(each, dict)]
    return _present(
        tools=[each for each in names if isinstance(each, str)],
        max_tokens=tokens if type(tokens) in (int, float) else None,
    )


def _elicitation(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    url = operation.params.get("url")
    return _present(
        mode=target.name,
        url=url if isinstance(url, str) else None,
        message_digest=digest(operation.params.get("message")),
    )


def _subscription(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    return _present(name=target.name, kind=target.kind)


def _method(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    return {"params": operation.params}


def _roots(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    return {}


_TWO_READINGS = re.compile(
    r"""
      %(2f|5c|2e|25|00)                       # encoded structure, double encoding
    | %(?![0-9a-f]{2})                        # a broken escape
    | ^\x20 | [\\\x00-\x1f\x7f]              # what some parsers strip or take for a slash
    | (?:^|[/?\#:]) \.\.? (?:[/?\#]|$)        # dot segments, wherever a server begins the path
    """,
    re.IGNORECASE | re.VERBOSE,
)


def _resource(operation: Operation, target: Target, facts: Facts) -> JsonObject:
    """The URI taken apart.

    `normal` is False when the path as a server may decode it is not the path as it is written: dot
    segments, encoded separators, double encoding, no UTF-8.
    """
    try:
        parts = urlsplit(target.name)
        path = unquote_to_bytes(parts.path).decode("utf-8")
    except ValueError:
        empty = {"scheme": "", "host": "", "path": ""}
        return _present(uri=target.name, **empty, normal=False, known=facts.known)
    clean = _without_dots(path)
    return _present(
        uri=target.name,
        scheme=parts.scheme.lower(),
        host=parts.netloc.lower(),
        path=clean,
        normal=clean == path and not _TWO_READINGS.search(target.name),
        known=facts.known,
    )


def _without_dots(path: str) -> str:
    """The path read from its root on; a trailing slash stays."""
    rooted = posixpath.normpath("/" + path.lstrip("/"))
    clean = rooted if path.startswith("/") else rooted[1:]
    return clean + "/" if path.endswith("/") and not clean.endswith("/") else clean


_OBJECTS: Mapping[str, Callable[[Operation, Target, Facts], JsonObject]] = {
    "tool": _tool,
    "resource": _resource,
    "prompt": _prompt,
    "completion": _completion,
    "subscription": _subscription,
    "task": _task,
    "sampling": _sampling,
    "elicitation": _elicitation,
    "roots": _roots,
    "method": _method,
}


def _slim(
    listing: Listing, item: JsonObject, tasks: Mapping[str, Task], pins: Mapping[str, str] | None
) -> JsonObject:
    name = item_name(listing, item) or ""
    target = {"type": listing.item_target, "name": name}
    if listing.kind == "tasks":
        return {"target": target, "task": _known_task(name, tasks.get(name))}
    if listing.kind != "tools":
        return {"target": target}
    annotations = item.get("annotations")
    return _slim_tool(
        name, annotations if isinstance(annotations, dict) else {}, digest(item), pins
    )


def _slim_entry(listing: Listing, entry: Named, pins: Mapping[str, str] | None) -> JsonObject:
    if isinstance(entry, Tool):
        return _slim_tool(entry.name, entry.annotations, entry.digest, pins)
    return {"target": {"type": listing.item_target, "name": entry.name}}


def _slim_tool(
    name: str, annotations: Mapping[str, Any], definition: str, pins: Mapping[str, str] | None
) -> JsonObject:
    return _present(
        target={"type": "tool", "name": name},
        annotations=dict(annotations),
        digest=definition,
        pinned=is_pinned(pins, name, definition),
    )


def item_name(listing: Listing, item: JsonObject) -> str | None:
    """The name by which a listed item is asked for, None when it has none."""
    name = item.get(listing.item_name)
    return name if isinstance(name, str) else None


def _arguments(operation: Operation) -> JsonObject:
    arguments = operation.params.get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def _present(**fields: Any) -> JsonObject:
    """Only what is there: an absent thing is an absent key, never null."""
    return {key: value for key, value in fields.items() if value is not None}
