"""Which headers go on, which are refused, and which end here.

One set of header names per reason (RFC 9110 §7.6.1; MCP streamable-http). Everything not named here
is end-to-end and goes on as it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from multidict import CIMultiDict, CIMultiDictProxy

from sidecar.errors import HeaderMismatch, MalformedMessage, ProtocolError
from sidecar.policy.enforcement import TRACE_CONTEXT

SESSION = "Mcp-Session-Id"
VERSION = "MCP-Protocol-Version"
ASSERTION = "MCP-Sidecar-Assertion"

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
    }
)
REWRITTEN = frozenset({"host", "origin", "content-length", "content-type", "accept-encoding"})
MODERN_ONLY = ("mcp-method", "mcp-name", "mcp-param-")
SINGLE = ("host", "origin", "content-type", "content-length", "authorization", "mcp-session-id")
ROUTING = ("mcp-protocol-version", "mcp-method", "mcp-name")
MAX_SHOWN = 1024
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Headers = CIMultiDictProxy[str] | CIMultiDict[str]


def refuse_duplicates(headers: Headers, single: Iterable[str] = SINGLE) -> None:
    """Refuse a second value where two readers may take different ones.

    Raises:
        HeaderMismatch: a routing header stands twice.
        MalformedMessage: another single-valued header does.
    """
    for name in ROUTING:
        if len(headers.getall(name, ())) > 1:
            raise HeaderMismatch(f"header {name} stands more than once")
    for name in single:
        if len(headers.getall(name, ())) > 1:
            raise MalformedMessage(f"header {name} stands more than once")


def refuse_other_content(headers: Headers) -> None:
    """A body is plain JSON in UTF-8: what is labelled otherwise, some reader reads otherwise.

    Raises:
        ProtocolError: 415.
    """
    media, *parameters = (each.strip().lower() for each in _one(headers, "content-type").split(";"))
    charset_only = all(each in ("", "charset=utf-8", 'charset="utf-8"') for each in parameters)
    if media != "application/json" or not charset_only:
        raise ProtocolError("Content-Type must be application/json, in UTF-8", status=415)
    if _one(headers, "content-encoding").lower() not in ("", "identity"):
        raise ProtocolError("a body must not be compressed", status=415)


def refuse_other_readers(headers: Headers, *media: str) -> None:
    """Refuse a client that says it can not read what it would be answered with.

    Raises:
        ProtocolError: 406.
    """
    accept = _one(headers, "accept").lower()
    readable = {each.partition(";")[0].strip() for each in accept.split(",")}
    for each in media if accept else ():
        if not readable & {each, f"{each.partition('/')[0]}/*", "*/*"}:
            raise ProtocolError(f"Accept must list {' and '.join(media)}", status=406)


def refuse_strangers(
    headers: Headers, *, loopback: bool, hosts: Iterable[str], origins: Iterable[str]
) -> None:
    """Check Host and Origin against the sidecar's own lists (DNS rebinding, MCP transports).

    Raises:
        ProtocolError: 403.
    """
    host = _one(headers, "host").lower()
    allowed = frozenset(hosts) or (LOOPBACK if loopback else None)
    if allowed is not None and not {host, _hostname(host)} & allowed:
        raise ProtocolError("this Host is not served here", status=403)
    origin = headers.get("origin", "").lower()
    if not origin or origin in origins:
        return
    if not loopback or _hostname(origin.partition("://")[2]) not in LOOPBACK:
        raise ProtocolError("this Origin may not call here", status=403)


def to_upstream(
    headers: Headers,
    *,
    modern: bool,
    authorization: bool,
    trace: Mapping[str, str],
    asserting: frozenset[str] = frozenset(),
) -> CIMultiDict[str]:
    """The client's headers as they go on to the server.

    Those that are `asserting` who somebody is never do: the server might believe them.
    """
    ended = HOP_BY_HOP | REWRITTEN | TRACE_CONTEXT | _named_by_connection(headers) | asserting
    if not authorization:
        ended |= {"authorization"}
    onward: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        lower = name.lower()
        if {lower, _hyphened(lower)} & ended or _is_assertion(lower):
            continue
        if modern and lower == "mcp-session-id":
            continue
        if not modern and lower.startswith(MODERN_ONLY):
            continue
        onward.add(name, value)
    onward.update({**trace, "Accept-Encoding": "identity"})
    return onward


def shown_to_policy(headers: Headers, names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that are there, as far as they are text that every reader reads alike."""
    found = {name: ", ".join(headers.getall(name, ())) for name in names if name in headers}
    return {name: value for name, value in found.items() if _is_short_text(value)}


def _is_short_text(value: str) -> bool:
    return len(value) <= MAX_SHOWN and value.isprintable()


def to_client(headers: Headers) -> CIMultiDict[str]:
    """The server's headers as they go back."""
    ended = HOP_BY_HOP | {"content-length"} | _named_by_connection(headers)
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in ended and not _is_assertion(name.lower())
    )


def _is_assertion(lower: str) -> bool:
    """Ours alone to send; with underscores too, which some servers read as hyphens."""
    return _hyphened(lower) == ASSERTION.lower()


def _hyphened(lower: str) -> str:
    return lower.replace("_", "-")


def _named_by_connection(headers: Headers) -> set[str]:
    values = ",".join(headers.getall("connection", ()))
    return {each.strip().lower() for each in values.split(",") if each.strip()}


def _one(headers: Headers, name: str) -> str:
    return ",".join(headers.getall(name, ())).strip()


def _hostname(authority: str) -> str:
    """The name in `name`, `name:port` or `[v6]:port`."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]
