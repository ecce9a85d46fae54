"""Headers that repeat the body: which there are, and that a server reads in them what is there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.inbound import (
    decode_header_value,
    encode_header_value,
    find_invalid_x_mcp_header,
    mcp_param_headers,
    x_mcp_header_map,
)

from sidecar.errors import MalformedMessage
from sidecar.protocol.jsonrpc import Notification, Request
from sidecar.protocol.methods import MODERN_REVISION, MethodTable
from sidecar.protocol.mirror import (
    Mirror,
    contradicted,
    parameter_headers,
    read_mirrors,
    request_headers,
)
from sidecar.protocol.session import VERSION_KEY, decode_sentinel, encode_sentinel

TABLE = MethodTable.of(("tickets/purge",))
ENVELOPE = {"_meta": {VERSION_KEY: MODERN_REVISION}}
TEXT = st.text(st.characters(codec="utf-8"))


def annotated(name: Any, kind: Any = "string", **more: Any) -> dict[str, Any]:
    return {"type": kind, "x-mcp-header": name, **more}


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


# ── Values ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("get_ticket", "get_ticket"),
        ("two words", "two words"),
        ("file:///a?b=c#d", "file:///a?b=c#d"),
        ("~!@", "~!@"),
        (" x", "=?base64?IHg=?="),
        ("x ", "=?base64?eCA=?="),
        ("\tx", "=?base64?CXg=?="),
        ("a\r\nb: c", "=?base64?YQ0KYjogYw==?="),
        ("\x7f", "=?base64?fw==?="),
        ("é", "=?base64?w6k=?="),
        ("=?base64?w6k=?=", "=?base64?PT9iYXNlNjQ/dzZrPT89?="),
        ("=?BASE64?w6k=?=", "=?BASE64?w6k=?="),
    ],
)
def test_what_a_header_can_not_carry_is_wrapped(text: str, value: str) -> None:
    assert encode_sentinel(text) == value
    assert decode_sentinel(value) == text


@given(TEXT)
def test_a_header_is_read_as_what_was_written(text: str) -> None:
    value = encode_sentinel(text)
    assert decode_sentinel(value) == text
    assert value.isascii()
    assert value == value.strip()
    assert value.isprintable()


@given(TEXT)
def test_a_header_is_the_one_that_the_official_client_writes(text: str) -> None:
    assert encode_sentinel(text) == encode_header_value(text)
    assert decode_header_value(encode_sentinel(text)) == text


# ── The envelope ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("tools/call", {"name": "get_ticket"}, "get_ticket"),
        ("tools/call", {"name": "größe"}, "=?base64?Z3LDtsOfZQ==?="),
        ("prompts/get", {"name": "greet"}, "greet"),
        ("resources/read", {"uri": "file:///a"}, "file:///a"),
        ("tasks/get", {"taskId": "t-1"}, "t-1"),
        ("tasks/update", {"taskId": "t-1"}, "t-1"),
        ("tasks/cancel", {"taskId": "t-1"}, "t-1"),
        ("tools/list", {}, None),
        ("completion/complete", {"ref": {"type": "ref/prompt", "name": "greet"}}, None),
        ("subscriptions/listen", {"notifications": {}}, None),
        ("tickets/purge", {"name": "x"}, None),
    ],
)
def test_a_request_repeats_revision_method_and_name(
    method: str, params: dict[str, Any], name: str | None
) -> None:
    headers = request_headers(Request(1, method, {**params, **ENVELOPE}), TABLE)
    expected = {"MCP-Protocol-Version": MODERN_REVISION, "Mcp-Method": method}
    assert headers == (expected if name is None else {**expected, "Mcp-Name": name})


def test_a_message_without_an_envelope_repeats_nothing() -> None:
    assert request_headers(Request(1, "tools/call", {"name": "x"}), TABLE) == {}
    assert request_headers(Notification("notifications/cancelled"), TABLE) == {}


# ── Annotated arguments ───────────────────────────────────────────────────────────────────────────

DEEP = schema(a=schema(b=annotated("B", "integer")), c=annotated("C"))


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (schema(), ()),
        (None, ()),
        ([], ()),
        (schema(a={"type": "string"}), ()),
        (schema(a=annotated("A")), (Mirror(("a",), "Mcp-Param-A"),)),
        (schema(a=annotated("A", "boolean")), (Mirror(("a",), "Mcp-Param-A"),)),
        (DEEP, (Mirror(("a", "b"), "Mcp-Param-B"), Mirror(("c",), "Mcp-Param-C"))),
        (schema(a={"type": "object", "default": {"x-mcp-header": "data"}}), ()),
        (schema(a={"enum": [{"x-mcp-header": "data"}]}), ()),
        (schema(**{"x-mcp-header": {"type": "string"}}), ()),
    ],
)
def test_annotations_are_found_where_properties_lead(
    given_: Any, expected: tuple[Mirror, ...]
) -> None:
    assert set(read_mirrors(given_)) == set(expected)
    assert find_invalid_x_mcp_header(given_) is None


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(schema(a=annotated("")), id="no name"),
        pytest.param(schema(a=annotated("a b")), id="no token"),
        pytest.param(schema(a=annotated("A\r\nX")), id="two headers"),
        pytest.param(schema(a=annotated("ä")), id="not ASCII"),
        pytest.param(schema(a=annotated(7)), id="no text"),
        pytest.param(schema(a=annotated("A", "number")), id="a number"),
        pytest.param(schema(a=annotated("A", "object")), id="an object"),
        pytest.param(schema(a=annotated("A", ["string", "null"])), id="several types"),
        pytest.param(schema(a={"x-mcp-header": "A"}), id="no type"),
        pytest.param(schema(a=annotated("Same"), b=annotated("same")), id="twice"),
        pytest.param(annotated("A"), id="the root"),
        pytest.param(schema(a={"type": "array", "items": annotated("A")}), id="items"),
        pytest.param({"anyOf": [schema(a=annotated("A"))]}, id="anyOf"),
        pytest.param({"$defs": {"d": schema(a=annotated("A"))}}, id="definitions"),
        pytest.param({"additionalProperties": annotated("A")}, id="any property"),
    ],
)
def test_a_bad_annotation_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match="x-mcp-header"):
        read_mirrors(bad)
    assert find_invalid_x_mcp_header(bad) is not None


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        ({"a": {"b": 7}, "c": "x"}, {"Mcp-Param-B": "7", "Mcp-Param-C": "x"}),
        ({"a": {"b": 42.0}}, {"Mcp-Param-B": "42"}),
        ({"a": {"b": -0.5}}, {"Mcp-Param-B": "-0.5"}),
        ({"a": {"b": True}}, {"Mcp-Param-B": "true"}),
        ({"a": {"b": False}, "c": None}, {"Mcp-Param-B": "false"}),
        ({"a": {"b": None}, "c": ""}, {"Mcp-Param-C": ""}),
        ({"a": 7, "c": ["x"]}, {}),
        ({"c": " é "}, {"Mcp-Param-C": "=?base64?IMOpIA==?="}),
        ({}, {}),
        (None, {}),
        ("text", {}),
    ],
)
def test_an_argument_that_is_there_is_repeated(arguments: Any, headers: dict[str, str]) -> None:
    assert parameter_headers(read_mirrors(DEEP), arguments) == headers


SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT


@given(st.fixed_dictionaries({}, optional={"a": st.dictionaries(TEXT, SCALARS), "c": SCALARS}))
def test_arguments_are_repeated_as_the_official_client_does(arguments: dict[str, Any]) -> None:
    expected = mcp_param_headers(x_mcp_header_map(DEEP), arguments)
    assert parameter_headers(read_mirrors(DEEP), arguments) == expected


# ── Headers that contradict the arguments ─────────────────────────────────────────────────────────

REGION = read_mirrors(schema(region=annotated("Region"), days=annotated("Days", "integer")))


@pytest.mark.parametrize(
    ("arguments", "sent", "found"),
    [
        pytest.param({"region": "eu"}, {"Mcp-Param-Region": ["eu"]}, None, id="repeated"),
        pytest.param({"region": "é"}, {"Mcp-Param-Region": ["=?base64?w6k=?="]}, None, id="base64"),
        pytest.param({"days": 3}, {"Mcp-Param-Days": [" 3 "]}, None, id="a number"),
        pytest.param({}, {}, None, id="neither"),
        pytest.param({"region": None}, {}, None, id="null has none"),
        pytest.param(None, {}, None, id="no arguments"),
        pytest.param({"region": "eu"}, {}, "Mcp-Param-Region", id="missing"),
        pytest.param(
            {"region": "eu"}, {"Mcp-Param-Region": ["us"]}, "Mcp-Param-Region", id="other"
        ),
        pytest.param({}, {"Mcp-Param-Region": ["us"]}, "Mcp-Param-Region", id="without argument"),
        pytest.param(
            {"region": ["eu"]}, {"Mcp-Param-Region": ["eu"]}, "Mcp-Param-Region", id="list"
        ),
        pytest.param(
            {"region": "eu"}, {"Mcp-Param-Region": ["eu", "eu"]}, "Mcp-Param-Region", id="twice"
        ),
        pytest.param(
            {"region": "é"},
            {"Mcp-Param-Region": ["=?base64?w6k?="]},
            "Mcp-Param-Region",
            id="padding",
        ),
    ],
)
def test_a_header_that_does_not_repeat_its_argument_is_found(
    arguments: Any, sent: dict[str, list[str]], found: str | None
) -> None:
    assert contradicted(REGION, arguments, lambda name: sent.get(name, [])) == found


@given(st.dictionaries(st.sampled_from(["region", "days"]), TEXT | st.integers() | st.none()))
def test_the_headers_that_we_write_contradict_nothing(arguments: dict[str, Any]) -> None:
    headers = parameter_headers(REGION, arguments)
    sent = {name: [value] for name, value in headers.items()}
    assert contradicted(REGION, arguments, lambda name: sent.get(name, [])) is None
