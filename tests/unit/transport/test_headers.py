"""Which headers are refused, which end here and which go on."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from multidict import CIMultiDict

from sidecar.errors import HeaderMismatch, MalformedMessage, ProtocolError
from sidecar.transport import headers as rules


def made(*pairs: tuple[str, str]) -> CIMultiDict[str]:
    return CIMultiDict(pairs)


@pytest.mark.parametrize("name", ["MCP-Protocol-Version", "Mcp-Method", "mcp-name"])
def test_a_routing_header_that_stands_twice_is_a_mismatch_even_with_equal_values(name: str) -> None:
    with pytest.raises(HeaderMismatch):
        rules.refuse_duplicates(made((name, "x"), (name.upper(), "x")))


@pytest.mark.parametrize("name", ["Host", "Origin", "Content-Type", "Authorization"])
def test_another_single_header_that_stands_twice_is_malformed(name: str) -> None:
    with pytest.raises(MalformedMessage):
        rules.refuse_duplicates(made((name, "x"), (name, "y")))


def test_a_header_that_may_stand_twice_may() -> None:
    rules.refuse_duplicates(made(("Accept", "application/json"), ("Accept", "text/event-stream")))


@pytest.mark.parametrize(
    "value",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;",
    ],
)
def test_json_in_utf_8_is_taken(value: str) -> None:
    rules.refuse_other_content(made(("Content-Type", value)))


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(made(), id="no content type"),
        pytest.param(made(("Content-Type", "text/plain")), id="text"),
        pytest.param(made(("Content-Type", "application/jsonx")), id="begins like json"),
        pytest.param(made(("Content-Type", "application/json-rpc")), id="another json"),
        pytest.param(made(("Content-Type", "text/plain, application/json")), id="a list"),
        pytest.param(made(("Content-Type", "application/json; charset=utf-16")), id="utf-16"),
        pytest.param(made(("Content-Type", "application/json; profile=x")), id="parameter"),
        pytest.param(
            made(("Content-Type", "application/json"), ("Content-Encoding", "gzip")), id="gzip"
        ),
    ],
)
def test_other_content_is_415(headers: CIMultiDict[str]) -> None:
    with pytest.raises(ProtocolError) as refused:
        rules.refuse_other_content(headers)
    assert refused.value.status == 415


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        pytest.param((), None, id="nothing is said"),
        pytest.param(("*/*",), None, id="anything"),
        pytest.param(("text/*;q=0.5, Application/JSON",), None, id="by kind"),
        pytest.param(("application/json", "text/event-stream"), None, id="two headers"),
        pytest.param(("application/json",), 406, id="one of two"),
        pytest.param(("text/html",), 406, id="neither"),
    ],
)
def test_who_can_not_read_an_answer_is_406(accept: tuple[str, ...], status: int | None) -> None:
    headers = made(*(("Accept", each) for each in accept))
    with pytest.raises(ProtocolError) if status else nullcontext() as refused:
        rules.refuse_other_readers(headers, "application/json", "text/event-stream")
    assert getattr(getattr(refused, "value", None), "status", None) == status


HOSTS = [
    # loopback, configured hosts, Host, served
    (True, (), "localhost", True),
    (True, (), "localhost:8080", True),
    (True, (), "127.0.0.1:1", True),
    (True, (), "[::1]:8080", True),
    (True, (), "evil.example", False),
    (True, (), "localhost.evil.example", False),
    (True, (), "", False),
    (False, (), "tickets.support.svc:8080", True),
    (False, ("tickets.svc",), "tickets.svc:8080", True),
    (False, ("tickets.svc:8080",), "tickets.svc:8080", True),
    (False, ("tickets.svc:8080",), "tickets.svc:9", False),
    (False, ("tickets.svc",), "evil.example", False),
    (True, ("tickets.svc",), "localhost", False),
]


@pytest.mark.parametrize(("loopback", "hosts", "host", "served"), HOSTS)
def test_only_our_own_host_names_are_served(
    loopback: bool, hosts: tuple[str, ...], host: str, served: bool
) -> None:
    headers = made(("Host", host))
    if served:
        rules.refuse_strangers(headers, loopback=loopback, hosts=hosts, origins=())
        return
    with pytest.raises(ProtocolError) as refused:
        rules.refuse_strangers(headers, loopback=loopback, hosts=hosts, origins=())
    assert refused.value.status == 403


ORIGINS = [
    # loopback, configured origins, Origin, may call
    (True, (), "http://localhost:6274", True),
    (True, (), "http://127.0.0.1", True),
    (True, (), "http://[::1]:3000", True),
    (True, (), "https://evil.example", False),
    (True, (), "http://localhost.evil.example", False),
    (True, (), "null", False),
    (False, (), "http://localhost:6274", False),
    (False, ("https://app.example",), "https://app.example", True),
    (False, ("https://app.example",), "https://app.example.evil", False),
]


@pytest.mark.parametrize(("loopback", "origins", "origin", "may"), ORIGINS)
def test_only_listed_origins_may_call(
    loopback: bool, origins: tuple[str, ...], origin: str, may: bool
) -> None:
    headers = made(("Host", "localhost"), ("Origin", origin))
    if may:
        rules.refuse_strangers(headers, loopback=loopback, hosts=(), origins=origins)
        return
    with pytest.raises(ProtocolError) as refused:
        rules.refuse_strangers(headers, loopback=loopback, hosts=(), origins=origins)
    assert refused.value.status == 403


CLIENT = made(
    ("Host", "sidecar"),
    ("Origin", "http://localhost"),
    ("Connection", "keep-alive, X-Private"),
    ("X-Private", "1"),
    ("Transfer-Encoding", "chunked"),
    ("Accept", "application/json, text/event-stream"),
    ("Accept-Encoding", "gzip"),
    ("Authorization", "Bearer t"),
    ("MCP-Protocol-Version", "2025-11-25"),
    ("Mcp-Session-Id", "s"),
    ("Mcp-Method", "tools/call"),
    ("Mcp-Name", "x"),
    ("Mcp-Param-Region", "eu"),
    ("traceparent", "00-1-2-01"),
    ("X-Request-Id", "r"),
)
TRACE = {"traceparent": "ours"}


def onward(*, modern: bool, authorization: bool = True) -> CIMultiDict[str]:
    return rules.to_upstream(CLIENT, modern=modern, authorization=authorization, trace=TRACE)


@pytest.mark.parametrize("modern", [True, False])
def test_hop_by_hop_headers_and_those_named_by_connection_end_here(modern: bool) -> None:
    gone = {"host", "origin", "connection", "x-private", "transfer-encoding"}
    assert not gone & {name.lower() for name in onward(modern=modern)}


@pytest.mark.parametrize("modern", [True, False])
def test_end_to_end_headers_go_on_as_they_came(modern: bool) -> None:
    sent = onward(modern=modern)
    assert (sent["Accept"], sent["X-Request-Id"]) == (CLIENT["Accept"], "r")


@pytest.mark.parametrize("modern", [True, False])
def test_the_trace_is_ours_and_answers_are_not_compressed(modern: bool) -> None:
    sent = onward(modern=modern)
    assert (sent.getall("traceparent"), sent["Accept-Encoding"]) == (["ours"], "identity")


def test_legacy_servers_get_no_mirrors_that_nobody_checked() -> None:
    assert not [name for name in onward(modern=False) if name in ("Mcp-Method", "Mcp-Name")]
    assert "Mcp-Param-Region" not in onward(modern=False)
    assert onward(modern=False)["Mcp-Session-Id"] == "s"


def test_modern_servers_get_the_mirrors_and_no_session() -> None:
    sent = onward(modern=True)
    assert (sent["Mcp-Name"], sent["Mcp-Param-Region"]) == ("x", "eu")
    assert "Mcp-Session-Id" not in sent


def test_authorization_goes_on_only_where_that_is_configured() -> None:
    assert onward(modern=True)["Authorization"] == "Bearer t"
    assert "Authorization" not in onward(modern=True, authorization=False)


def test_answers_lose_what_belongs_to_the_connection() -> None:
    answer = made(("Content-Length", "5"), ("Connection", "close"), ("WWW-Authenticate", "Bearer"))
    assert list(rules.to_client(answer)) == ["WWW-Authenticate"]


def test_the_policy_is_shown_listed_headers_as_far_as_they_are_text() -> None:
    names = ("x-tenant", "x-twice", "x-odd", "x-long", "x-tab", "x-none")
    sent = made(
        ("X-Tenant", "blue"),
        ("X-Twice", "a"),
        ("x-twice", "b"),
        ("X-Odd", "\udcff"),
        ("X-Long", "x" * 1025),
        ("X-Tab", "a\tb"),
        ("X-Other", "not asked for"),
    )
    assert rules.shown_to_policy(sent, names) == {"x-tenant": "blue", "x-twice": "a, b"}
    assert rules.shown_to_policy(sent, ()) == {}


@pytest.mark.parametrize("name", ["MCP-Sidecar-Assertion", "mcp_sidecar-assertion"])
def test_nobody_but_the_sidecar_sends_an_assertion(name: str) -> None:
    forged = made((name, "x"), (name.upper(), "y"), ("X-Kept", "z"))
    for modern in (True, False):
        onward = rules.to_upstream(forged, modern=modern, authorization=True, trace={})
        assert set(onward) == {"X-Kept", "Accept-Encoding"}
    assert set(rules.to_client(forged)) == {"X-Kept"}
