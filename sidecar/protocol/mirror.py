"""What a request of 2026-07-28 repeats in HTTP headers (streamable-http, Request Metadata).

A server may route by `MCP-Protocol-Version`, `Mcp-Method` and `Mcp-Name` without reading the body,
and by the arguments that a tool's input schema annotates with `x-mcp-header`. The body stays what
is judged; the headers are written from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.errors import MalformedMessage
from sidecar.protocol.jsonrpc import MAX_SAFE_INTEGER, JsonObject, Notification, Request
from sidecar.protocol.methods import Direction, Era, MethodTable
from sidecar.protocol.session import decode_sentinel, encode_sentinel, envelope_version

ANNOTATION = "x-mcp-header"
PREFIX = "Mcp-Param-"

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TYPES = ("string", "integer", "boolean")

# The keywords of JSON Schema 2020-12 that hold schemas, by the shape of what they hold. What else
# is in a schema is data, such as `default` and `enum`.
_ONE = frozenset(
    {
        "items",
        "contains",
        "unevaluatedItems",
        "additionalProperties",
        "propertyNames",
        "unevaluatedProperties",
        "not",
        "if",
        "then",
        "else",
        "contentSchema",
    }
)
_SEVERAL = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"patternProperties", "dependentSchemas", "$defs", "definitions"})


@dataclass(frozen=True, slots=True)
class Mirror:
    """An argument that a header repeats: where it is in the arguments, and the header's name."""

    path: tuple[str, ...]
    header: str


def read_mirrors(schema: Any) -> tuple[Mirror, ...]:
    """The annotated arguments of an input schema.

    Raises:
        MalformedMessage: an annotation that is not allowed. Clients must not show such a tool.
    """
    found: dict[str, Mirror] = {}
    for path, position in _positions(schema):
        if ANNOTATION not in position:
            continue
        if problem := _problem(path, position):
            raise MalformedMessage(f"{ANNOTATION}: {problem}")
        mirror = Mirror(path or (), PREFIX + position[ANNOTATION])
        if mirror.header.lower() in found:
            raise MalformedMessage(f"{ANNOTATION}: {position[ANNOTATION]!r} stands twice")
        found[mirror.header.lower()] = mirror
    return tuple(found.values())


def _problem(path: tuple[str, ...] | None, position: JsonObject) -> str | None:
    name = position[ANNOTATION]
    if not path:
        return "only for what `properties` alone lead to"
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        return "must be the name of a header"
    if position.get("type") not in _TYPES:
        return f"only for {', '.join(_TYPES)}"
    return None


def _positions(root: Any) -> Iterator[tuple[tuple[str, ...] | None, JsonObject]]:
    """Every schema in a schema, with the path of properties to it; None when there is none."""
    waiting: list[tuple[tuple[str, ...] | None, Any]] = [((), root)]
    while waiting:
        path, schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        yield path, schema
        for keyword, value in schema.items():
            if keyword == "properties" and isinstance(value, dict):
                for name, below in value.items():
                    waiting.append((None if path is None else (*path, name), below))
            else:
                waiting += [(None, below) for below in _below(keyword, value)]


def _below(keyword: str, value: Any) -> list[Any]:
    if keyword in _ONE:
        return [value]
    if keyword in _SEVERAL and isinstance(value, list):
        return value
    return list(value.values()) if keyword in _NAMED and isinstance(value, dict) else []


def parameter_headers(mirrors: tuple[Mirror, ...], arguments: Any) -> dict[str, str]:
    """The headers that repeat arguments; one that is absent, null or no scalar has none."""
    texts = {each.header: _mirrored(each, arguments) for each in mirrors}
    return {name: encode_sentinel(text) for name, text in texts.items() if text is not None}


def contradicted(
    mirrors: tuple[Mirror, ...], arguments: Any, sent: Callable[[str], list[str]]
) -> str | None:
    """The first header that does not repeat its argument, None when all of them do.

    `sent` gives the values of a header, none or several. One that is missing though its argument is
    there contradicts it, and so does one that stands without it, or twice, or is broken.
    """
    for mirror in mirrors:
        text = _mirrored(mirror, arguments)
        if [decode_sentinel(value) for value in sent(mirror.header)] != [text] * (text is not None):
            return mirror.header
    return None


def _mirrored(mirror: Mirror, arguments: Any) -> str | None:
    value = arguments
    for name in mirror.path:
        value = value.get(name) if isinstance(value, dict) else None
    return _text(value)


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_SAFE_INTEGER:
        return str(int(value))
    return str(value) if isinstance(value, (str, int, float)) else None


def request_headers(message: Request | Notification, table: MethodTable) -> Mapping[str, str]:
    """The headers that repeat the envelope; none for a message that has none."""
    version = envelope_version(message)
    if version is None:
        return {}
    headers = {"MCP-Protocol-Version": version, "Mcp-Method": message.method}
    row = table.find(message.method, "request", Direction.FROM_CLIENT, Era.MODERN)
    if row is not None and row.header:
        subject = (message.params or {}).get(row.subject[0])
        headers["Mcp-Name"] = encode_sentinel(str(subject))
    return headers
