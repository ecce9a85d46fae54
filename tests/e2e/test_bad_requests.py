"""HTTP requests that no client should send: refused each time, and nothing arrives.

The server behind the sidecar executes whatever it can make sense of, and its own log is the
witness, under a policy that allows everything and under one that denies everything.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.permissive_server import executed, records
from tests.support.processes import environment, wait_until
from tests.support.raw import (
    JSON_HEADERS,
    MODERN,
    Wire,
    call,
    code,
    dump,
    initialize,
    mirrors,
    modern,
    post,
    post_modern,
    request,
)
from tests.support.witnessed import (
    BAD_PARAMS,
    CALL,
    DENIED,
    FIVE_MEGABYTES,
    MISMATCH,
    NO_JSON,
    NO_MESSAGE,
    NO_METHOD,
    POLICIES,
    Listening,
    listening,
    table,
)


@pytest.fixture(scope="module", params=list(POLICIES))
def http(
    request: pytest.FixtureRequest, opa_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Listening]:
    log = tmp_path_factory.mktemp("http") / "log"
    with listening(request.param, environment(opa_bin), log) as place:
        yield place


@dataclass(frozen=True, slots=True)
class Post:
    """What is sent, and what must come back."""

    status: int
    code: int | None = None
    body: bytes = CALL
    headers: tuple[tuple[str, str], ...] = JSON_HEADERS
    verb: str = "POST"
    target: str | None = None
    host: str | None = None


def typed(media: str | None, status: int = 415, **more: Any) -> Post:
    headers = () if media is None else (("Content-Type", media),)
    return Post(status, NO_MESSAGE, headers=headers, **more)


def with_header(status: int, name: str, *values: str, **more: Any) -> Post:
    return Post(status, headers=(*JSON_HEADERS, *((name, value) for value in values)), **more)


def mirrored(status: int, expected: int, *changes: tuple[str, str | None], **more: Any) -> Post:
    """A modern call whose headers were changed: None takes one away, a second one is added."""
    gone = {name for name, value in changes if value is None or not value.startswith("+")}
    kept = [each for each in mirrors(call(7)) if each[0] not in gone]
    new = [(name, value.removeprefix("+")) for name, value in changes if value is not None]
    body = more.pop("body", dump(modern(call(7))))
    return Post(status, expected, headers=(*JSON_HEADERS, *kept, *new), body=body, **more)


def guessed(verb: str) -> Post:
    body = CALL if verb == "POST" else b""
    return with_header(404, "Mcp-Session-Id", "guessed", code=NO_MESSAGE, body=body, verb=verb)


OLD_ENVELOPE = dump(modern(call(7), "2025-06-18"))
UNKNOWN = request(7, "x/y")
UNKNOWN_MODERN = dump(modern(UNKNOWN))
VERSION, METHOD, NAME = "MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"

BAD_REQUESTS: list[tuple[str, Post]] = [
    ("empty body", Post(400, NO_JSON, body=b"")),
    ("white space", Post(400, NO_JSON, body=b" \r\n ")),
    # Content types and encodings.
    ("no media type", typed(None)),
    ("text/plain", typed("text/plain")),
    ("application/jsonx", typed("application/jsonx")),
    ("application/json-rpc", typed("application/json-rpc")),
    ("application/problem+json", typed("application/problem+json")),
    ("two media types", typed("text/plain, application/json")),
    ("UTF-16 charset", typed("application/json; charset=utf-16")),
    ("UTF-16 as it says", typed("application/json; charset=utf-16", body=CALL[:1])),
    ("latin-1 charset", typed("application/json;charset=iso-8859-1")),
    ("another parameter", typed("application/json; boundary=x")),
    ("a form", typed("application/x-www-form-urlencoded")),
    ("multipart", typed("multipart/form-data; boundary=x")),
    ("gzip", with_header(415, "Content-Encoding", "gzip", body=gzip.compress(CALL))),
    ("gzip, which is a lie", with_header(415, "Content-Encoding", "gzip")),
    ("deflate", with_header(415, "Content-Encoding", "deflate", body=zlib.compress(CALL))),
    ("br, which is a lie", with_header(415, "Content-Encoding", "br")),
    ("two encodings", with_header(415, "Content-Encoding", "identity", "gzip")),
    # A header that stands twice.
    ("two content types", with_header(400, "Content-Type", "application/json")),
    ("two hosts", with_header(400, "Host", "localhost")),
    ("two origins", with_header(400, "Origin", "http://localhost", "http://localhost")),
    ("two authorizations", with_header(400, "Authorization", "Bearer a", "Bearer b")),
    ("two sessions", with_header(400, "Mcp-Session-Id", "a", "b")),
    ("two lengths", with_header(400, "Content-Length", "3")),
    ("two versions", mirrored(400, MISMATCH, (VERSION, "+2025-11-25"))),
    ("two equal versions", mirrored(400, MISMATCH, (VERSION, f"+{MODERN}"))),
    ("two methods", mirrored(400, MISMATCH, (METHOD, "+ping"))),
    ("two equal names", mirrored(400, MISMATCH, (NAME, "+echo"))),
    # Headers that say something else than the body.
    ("no version", mirrored(400, MISMATCH, (VERSION, None))),
    ("no method", mirrored(400, MISMATCH, (METHOD, None))),
    ("no name", mirrored(400, MISMATCH, (NAME, None))),
    ("a legacy version", mirrored(400, MISMATCH, (VERSION, "2025-06-18"))),
    ("an unknown version", mirrored(400, MISMATCH, (VERSION, "2099-01-01"))),
    ("another method", mirrored(400, MISMATCH, (METHOD, "tools/list"))),
    ("a method in capitals", mirrored(400, MISMATCH, (METHOD, "Tools/Call"))),
    ("another name", mirrored(400, MISMATCH, (NAME, "harmless"))),
    ("a name in capitals", mirrored(400, MISMATCH, (NAME, "Echo"))),
    ("a coded name", mirrored(400, MISMATCH, (NAME, "=?base64?aGFybWxlc3M=?="))),
    ("a name badly coded", mirrored(400, MISMATCH, (NAME, "=?base64?ZWNobw?="))),
    ("a marker in capitals", mirrored(400, MISMATCH, (NAME, "=?BASE64?ZWNobw==?="))),
    ("no envelope", mirrored(400, BAD_PARAMS, body=CALL)),
    ("an envelope of a legacy version", mirrored(400, BAD_PARAMS, body=OLD_ENVELOPE)),
    ("initialize with a modern header", mirrored(404, NO_METHOD, body=dump(initialize(7)))),
    ("an unknown method, modern", mirrored(404, NO_METHOD, (METHOD, "x/y"), body=UNKNOWN_MODERN)),
    ("an unknown method, legacy", Post(200, NO_METHOD, body=dump(UNKNOWN))),
    # Targets.
    ("an absolute target", Post(404, target="http://127.0.0.1/mcp")),
    ("somebody else's", Post(404, target="http://example.com/mcp")),
    ("%6dcp", Post(404, target="/%6dcp")),
    ("a slash behind", Post(404, target="/mcp/")),
    ("two slashes", Post(404, target="//mcp")),
    ("a dot", Post(404, target="/./mcp")),
    ("two dots", Post(404, target="/x/../mcp")),
    ("a backslash", Post(404, target="/\\mcp")),
    ("a parameter", Post(404, target="/mcp;x=1")),
    ("capitals", Post(404, target="/MCP")),
    ("something below", Post(404, target="/mcp/sse")),
    ("the root", Post(404, target="/")),
    ("the admin's", Post(404, target="/metrics", verb="GET")),
    # Who asks.
    ("a strange host", Post(403, host="evil.example.com")),
    ("a strange host that looks like ours", Post(403, host="localhost.evil.example.com")),
    ("a strange origin", with_header(403, "Origin", "https://evil.example.com")),
    ("an origin that looks like ours", with_header(403, "Origin", "http://localhost.evil.com")),
    ("origin null", with_header(403, "Origin", "null")),
    *((f"{verb} in an unknown session", guessed(verb)) for verb in ("POST", "GET", "DELETE")),
    # Verbs.
    *((verb, Post(405, verb=verb)) for verb in ("OPTIONS", "PUT", "PATCH", "HEAD", "PROPFIND")),
]  # fmt: skip


@pytest.mark.parametrize("sent", table(BAD_REQUESTS))
def test_a_request_that_is_not_as_it_should_be_is_refused_and_goes_nowhere(
    http: Listening, sent: Post
) -> None:
    before = len(records(http.log))
    with Wire(http.url) as wire:
        wire.request(sent.body, sent.headers, verb=sent.verb, target=sent.target, host=sent.host)
        answer = wire.answer(sent.verb)
    assert answer.status == sent.status
    if sent.code is not None:
        assert code(answer.message) == sent.code
    assert len(records(http.log)) == before


@pytest.mark.parametrize(
    ("head", "body"),
    table(
        [
            ("length and chunks", "Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
            ("a strange coding", "Transfer-Encoding: cow", CALL),
            ("chunked, spelled oddly", "Transfer-Encoding: xchunked", CALL),
            ("a folded header", "Content-Length: 0\r\nX-A: 1\r\n  folded", b""),
            ("a NUL in a header", "X-A: a\0b\r\nContent-Length: 0", b""),
            ("white space before the colon", "Content-Length : 0", b""),
            ("a negative length", "Content-Length: -1", CALL),
            ("a length with a sign", f"Content-Length: +{len(CALL)}", CALL),
            ("a chunk size that is none", "Transfer-Encoding: chunked", b"zz\r\n" + CALL),
            ("a header of 20 KB", f"X-A: {'x' * 20_000}\r\nContent-Length: 0", b""),
        ]
    ),
)
def test_http_that_two_parsers_may_read_differently_is_refused(
    http: Listening, head: str, body: bytes
) -> None:
    before = len(records(http.log))
    with Wire(http.url) as wire:
        start = f"POST /mcp HTTP/1.1\r\nHost: {wire.authority}\r\nContent-Type: application/json"
        wire.send(f"{start}\r\n{head}\r\n\r\n".encode() + body)
        assert wire.answer().status == 400
    assert len(records(http.log)) == before


@pytest.mark.parametrize("framed", ["by its length", "in chunks"])
def test_a_body_of_5_megabytes_is_413(http: Listening, framed: str) -> None:
    before, body = len(records(http.log)), dump(call(7, text="x" * FIVE_MEGABYTES))
    with Wire(http.url) as wire:
        if framed == "by its length":
            wire.request(body)
        else:
            head = f"POST /mcp HTTP/1.1\r\nHost: {wire.authority}\r\nContent-Type: application/json"
            wire.send(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            wire.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        answer = wire.answer()
    assert (answer.status, code(answer.message), answer.message["id"]) == (413, NO_MESSAGE, None)
    assert len(records(http.log)) == before
    assert http.works()


@pytest.mark.parametrize(
    "sent",
    table(
        [
            ("nothing", b""),
            ("half a verb", b"PO"),
            ("half a head", b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Ty"),
            ("half a body", b"Content-Length: 1000\r\n\r\n" + CALL),
            ("half a chunk", b"Transfer-Encoding: chunked\r\n\r\nff\r\n" + CALL[:50]),
            (
                "no last chunk",
                b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(CALL), CALL),
            ),
        ]
    ),
)
def test_a_client_that_hangs_up_half_way_has_said_nothing(http: Listening, sent: bytes) -> None:
    before = len(executed(http.log))
    with Wire(http.url) as wire:
        head = f"POST /mcp HTTP/1.1\r\nHost: {wire.authority}\r\nContent-Type: application/json\r\n"
        wire.send(sent if not sent or sent.startswith(b"PO") else head.encode() + sent)
        wire.hang_up()
    assert http.works()
    assert len(executed(http.log)) == before + http.allows


def test_several_requests_in_one_piece_are_judged_one_by_one(http: Listening) -> None:
    before = len(executed(http.log))
    with Wire(http.url) as wire:
        head = f"POST /mcp HTTP/1.1\r\nHost: {wire.authority}\r\nContent-Type: application/json\r\n"
        bodies = [dump(call(f"piece {number}")) for number in range(3)]
        pieces = [
            b"%bContent-Length: %d\r\n\r\n%b" % (head.encode(), len(each), each) for each in bodies
        ]
        wire.send(b"".join(pieces))
        wait_until(lambda: wire.peek().count(b"HTTP/1.1 200") == 3, "three answers")
    done = [each["id"] for each in executed(http.log)[before:]]
    assert done == (["piece 0", "piece 1", "piece 2"] if http.allows else [])


@pytest.mark.parametrize("modern_era", [False, True], ids=["legacy", "modern"])
def test_an_ordinary_call_is_judged_and_legacy_ones_bring_no_modern_headers(
    http: Listening, modern_era: bool
) -> None:
    lying = (("Mcp-Name", "harmless"), ("Mcp-Method", "ping"), ("Mcp-Param-X", "y"))
    before = len(executed(http.log))
    send = post_modern if modern_era else post
    answer = send(http.url, call("ordinary"), **({} if modern_era else {"headers": lying}))
    assert (answer.status, code(answer.message)) == (200, None if http.allows else DENIED)
    assert [each["id"] for each in executed(http.log)[before:]] == ["ordinary"] * http.allows
    arrived = records(http.log, "http")[-1]["headers"]
    mirrored_on = {name for name in arrived if name in ("mcp-name", "mcp-method", "mcp-param-x")}
    if http.allows:
        assert mirrored_on == ({"mcp-name", "mcp-method"} if modern_era else set())


def test_a_stream_is_opened_and_a_session_ended_only_when_the_policy_says_so(
    http: Listening,
) -> None:
    opened = post(http.url, initialize())
    session = (("Mcp-Session-Id", opened.headers["mcp-session-id"]), *JSON_HEADERS)
    with Wire(http.url) as wire:
        wire.request(verb="GET", headers=session)
        assert wire.begin("GET").status == (200 if http.allows else 405)
    with Wire(http.url) as wire:
        wire.request(verb="DELETE", headers=session)
        wire.begin("DELETE")
    # Whoever ended it knows it no more.
    ended = {each["verb"] for each in records(http.log, "http")}
    answer = post(http.url, call(7), session[:1])
    assert answer.status == (404 if "DELETE" in ended else 200)


def test_a_notification_is_acknowledged_with_nothing(http: Listening) -> None:
    session = post(http.url, initialize()).headers["mcp-session-id"]
    notification = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    answer = post(http.url, notification, (("Mcp-Session-Id", session),))
    assert (answer.status, answer.body) == (202, b"")
