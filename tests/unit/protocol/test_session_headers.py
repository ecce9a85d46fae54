"""Headers that mirror the body say what the body says, or the message goes nowhere."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import HeaderMismatch, MalformedMessage, ProtocolError, UnknownMethod
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response
from sidecar.protocol.methods import MODERN_REVISION, MethodTable
from sidecar.protocol.session import check_headers, decode_sentinel
from tests.support.fakes import modern

TABLE = MethodTable.of(["acme/reindex"])


def headers(method: str, name: str | None = None, version: str = MODERN_REVISION) -> dict[str, str]:
    value = {"mcp-protocol-version": version, "mcp-method": method}
    return value if name is None else {**value, "mcp-name": name}


def sentinel(text: str) -> str:
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


CALL = modern("tools/call", 7, name="t")


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        pytest.param(CALL, headers("tools/call", "t"), id="as the body"),
        pytest.param(CALL, headers("tools/call", " t\t"), id="white space around"),
        pytest.param(CALL, headers("tools/call", sentinel("t")), id="encoded without need"),
        pytest.param(
            modern("tools/call", name="wörk"), headers("tools/call", sentinel("wörk")), id="encoded"
        ),
        pytest.param(
            modern("tools/call", name=" t "), headers("tools/call", sentinel(" t ")), id="spaces"
        ),
        pytest.param(
            modern("tools/call", name="=?base64?dA==?="),
            headers("tools/call", sentinel("=?base64?dA==?=")),
            id="a name like a sentinel",
        ),
        pytest.param(
            modern("tools/call", name="=?BASE64?dA==?="),
            headers("tools/call", "=?BASE64?dA==?="),
            id="upper-case marks are none",
        ),
        pytest.param(
            modern("resources/read", uri="u:a"), headers("resources/read", "u:a"), id="by uri"
        ),
        pytest.param(modern("tasks/get", taskId="1"), headers("tasks/get", "1"), id="by task"),
        pytest.param(modern("tools/list"), headers("tools/list"), id="nothing to mirror"),
        pytest.param(modern("tools/list"), headers("tools/list", "x"), id="a name for nothing"),
        pytest.param(
            CALL, {**headers("tools/call", "t"), "mcp-param-x": "y"}, id="parameters are untouched"
        ),
        pytest.param(modern("server/discover"), {}, id="negotiation decides nothing"),
        pytest.param(Response(1, {}), headers("tools/call"), id="an answer has none"),
        pytest.param(Request(1, "tools/call", {"name": "t"}), {}, id="handshake, no headers"),
        pytest.param(
            Request(1, "tools/call", {"name": "t"}),
            headers("tools/call", "other", "2025-11-25"),
            id="handshake revisions mirror nothing",
        ),
        pytest.param(
            Notification("notifications/cancelled", modern("tools/list").params),
            {},
            id="notification",
        ),
        pytest.param(
            modern("tools/list", version="2030-01-01"),
            headers("tools/list", version="2030-01-01"),
            id="a later revision",
        ),
    ],
)
def test_headers_that_say_what_the_body_says_are_fine(
    message: Message, sent: dict[str, str]
) -> None:
    check_headers(message, sent, TABLE)


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        pytest.param(CALL, {}, id="none"),
        pytest.param(CALL, headers("tools/call"), id="no name"),
        pytest.param(CALL, headers("tools/call", "u"), id="another name"),
        pytest.param(CALL, headers("tools/call", "T"), id="case of the name"),
        pytest.param(CALL, headers("tools/list", "t"), id="another method"),
        pytest.param(CALL, headers("Tools/Call", "t"), id="case of the method"),
        pytest.param(CALL, headers(sentinel("tools/call"), "t"), id="a method is never encoded"),
        pytest.param(CALL, headers("tools/call", "t", "2025-11-25"), id="an older revision"),
        pytest.param(CALL, headers("tools/call", "t", "2030-01-01"), id="a later revision"),
        pytest.param(CALL, {"mcp-method": "tools/call", "mcp-name": "t"}, id="no revision"),
        pytest.param(CALL, headers("tools/call", "t", f"\x0b{MODERN_REVISION}"), id="odd space"),
        pytest.param(CALL, headers("tools/call", "=?base64?dA?="), id="base64 without padding"),
        pytest.param(CALL, headers("tools/call", "=?base64?dB==?="), id="base64, not canonical"),
        pytest.param(CALL, headers("tools/call", "=?base64?d A==?="), id="base64 with a space"),
        pytest.param(CALL, headers("tools/call", "=?base64?/w==?="), id="base64, no UTF-8"),
        pytest.param(CALL, headers("tools/call", "=?base64??="), id="base64 of nothing"),
        pytest.param(CALL, headers("tools/call", "=?base64?dA=="), id="half a sentinel"),
        pytest.param(CALL, headers("tools/call", "=?Base64?dA==?="), id="case of the sentinel"),
        pytest.param(modern("tools/call", 7, name=" t"), headers("tools/call", " t"), id="trimmed"),
        pytest.param(modern("tools/call", 7, name=""), headers("tools/call"), id="an empty name"),
        pytest.param(modern("tools/call", 7), headers("tools/call", "t"), id="no name in the body"),
        pytest.param(modern("acme/reindex", 7), headers("tools/list"), id="a declared method"),
        pytest.param(modern("nobody/knows", 7), headers("tools/list"), id="an unknown method"),
    ],
)
def test_headers_that_differ_from_the_body_are_refused(
    message: Request, sent: dict[str, str]
) -> None:
    with pytest.raises(HeaderMismatch) as refused:
        check_headers(message, sent, TABLE)
    error = refused.value
    assert (error.rpc_code, error.status, error.request_id) == (-32020, 400, 7)


@pytest.mark.parametrize(
    ("message", "kind", "code", "status"),
    [
        pytest.param(
            Request(7, "tools/call", {"name": "t"}), MalformedMessage, -32602, 400, id="call"
        ),
        pytest.param(
            Request(7, "server/discover", {"_meta": {}}), MalformedMessage, -32602, 400, id="probe"
        ),
        pytest.param(Request(7, "initialize", {}), UnknownMethod, -32601, 404, id="handshake"),
        pytest.param(Request(7, "nobody/knows"), UnknownMethod, -32601, 404, id="unknown"),
        pytest.param(
            Notification("notifications/initialized"),
            MalformedMessage,
            -32602,
            400,
            id="notification",
        ),
    ],
)
@pytest.mark.parametrize("version", [MODERN_REVISION, "2030-01-01", "nonsense"])
def test_a_modern_header_needs_a_modern_body(
    message: Request | Notification, kind: type[ProtocolError], code: int, status: int, version: str
) -> None:
    with pytest.raises(kind) as refused:
        check_headers(message, headers(message.method, "t", version), TABLE)
    assert (refused.value.rpc_code, refused.value.status) == (code, status)
    assert refused.value.request_id == (7 if isinstance(message, Request) else None)


@given(st.text(st.characters(codec="utf-8")))
def test_any_name_can_be_mirrored(name: str) -> None:
    assert decode_sentinel(sentinel(name)) == name
    assert decode_sentinel(f" {sentinel(name)}\t") == name
