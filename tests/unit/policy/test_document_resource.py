"""A URI has one reading, or the question says that it has several."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy.document import Environment, build
from sidecar.protocol.jsonrpc import JsonObject, Request
from sidecar.protocol.methods import Direction, MethodTable
from sidecar.protocol.session import Session
from tests.support.fakes import ANA

ENVIRONMENT = Environment("0.1.0", "tickets", "stdio", "2026-11-22T10:15:00Z")


def resource(uri: str) -> JsonObject:
    """What the question about a read says of the resource."""
    message = Request(1, "resources/read", {"uri": uri})
    operation = Session(MethodTable.of()).receive(message, Direction.FROM_CLIENT)
    found = build(operation, operation.targets[0], ANA, ENVIRONMENT)["resource"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("uri", "scheme", "host", "path"),
    [
        pytest.param("demo://resource/1", "demo", "resource", "/1", id="a custom scheme"),
        pytest.param("file:///a/b/", "file", "", "/a/b/", id="a trailing slash"),
        pytest.param("file:///a/b", "file", "", "/a/b", id="a file"),
        pytest.param("file:///", "file", "", "/", id="the root"),
        pytest.param("ui://x", "ui", "x", "", id="no path"),
        pytest.param("ui://x/", "ui", "x", "/", id="an empty path"),
        pytest.param("FILE:///a", "file", "", "/a", id="case of the scheme"),
        pytest.param("file:///A", "file", "", "/A", id="case of the path"),
        pytest.param("file:///a%20b", "file", "", "/a b", id="an encoded space"),
        pytest.param("file:///a b", "file", "", "/a b", id="a raw space"),
        pytest.param("file:///%C3%A9", "file", "", "/é", id="encoded UTF-8"),
        pytest.param("file:///é", "file", "", "/é", id="raw UTF-8"),
        pytest.param("file:///.../a..b/.c", "file", "", "/.../a..b/.c", id="dots that are names"),
        pytest.param("urn:isbn:123", "urn", "", "isbn:123", id="no slashes"),
        pytest.param("https://h.example/a?x=1#y", "https", "h.example", "/a", id="query, fragment"),
        pytest.param("https://h.example:8443/a", "https", "h.example:8443", "/a", id="a port"),
        pytest.param("plain/path", "", "", "plain/path", id="no scheme"),
        pytest.param("", "", "", "", id="nothing"),
    ],
)
def test_a_uri_that_every_server_reads_alike_is_normal(
    uri: str, scheme: str, host: str, path: str
) -> None:
    found = resource(uri)
    assert found == {"uri": uri, "scheme": scheme, "host": host, "path": path, "normal": True}


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        pytest.param("file:///a/../etc/passwd", "/etc/passwd", id="dot segments"),
        pytest.param("file:///a/./b", "/a/b", id="a single dot"),
        pytest.param("file:///../../etc", "/etc", id="above the root"),
        pytest.param("file:///a/..", "/", id="dots at the end"),
        pytest.param("file:///a/%2e%2e/etc", "/etc", id="%2e%2e"),
        pytest.param("file:///a/.%2E/etc", "/etc", id=".%2E"),
        pytest.param("file:///a%2fb", "/a/b", id="%2f"),
        pytest.param("file:///a/..%2Fetc", "/etc", id="..%2F"),
        pytest.param("file:///a%5cb", "/a\\b", id="%5c"),
        pytest.param("file:///a/%252e%252e/b", "/a/%2e%2e/b", id="encoded twice"),
        pytest.param("file:///a\\..\\b", "/a\\..\\b", id="backslash"),
        pytest.param("file:///a%00.txt", "/a\x00.txt", id="NUL"),
        pytest.param("file:///a//b", "/a/b", id="an empty segment"),
        pytest.param("file:////etc/passwd", "/etc/passwd", id="two slashes in front"),
        pytest.param("file://///etc/passwd", "/etc/passwd", id="three slashes in front"),
        pytest.param("file:///a%zz", "/a%zz", id="a broken escape"),
        pytest.param("file:///a%", "/a%", id="half an escape"),
        pytest.param("docs:../secret", "secret", id="dots without root"),
        pytest.param("docs:a/../../secret", "secret", id="dots above no root"),
        pytest.param("demo://../secret", "/secret", id="dots for a host"),
        pytest.param("demo://%2e%2e/secret", "/secret", id="encoded dots for a host"),
        pytest.param("demo://./secret", "/secret", id="a dot for a host"),
        pytest.param("file:///a?b/../../etc", "/a", id="dots behind a question mark"),
        pytest.param("file:///a#/../etc", "/a", id="dots behind a hash"),
        pytest.param(" file:///a", "/a", id="a space in front"),
        pytest.param("../secret", "secret", id="no scheme, dots"),
    ],
)
def test_a_uri_that_servers_read_differently_is_not_normal(uri: str, path: str) -> None:
    found = resource(uri)
    assert (found["normal"], found["path"], found["uri"]) == (False, path, uri)


@pytest.mark.parametrize("uri", ["file:///%ff", "file:///%c0%ae%c0%ae/", "https://[::1/a"])
def test_a_uri_that_is_none_has_no_parts(uri: str) -> None:
    assert resource(uri) == {"uri": uri, "scheme": "", "host": "", "path": "", "normal": False}


@given(
    st.lists(
        st.sampled_from(
            ["a", "..", ".", "/", "//", "%2e", "%2f", "%25", "\\", "?", "#", ":", "é", "%41"]
        ),
        max_size=8,
    ).map("".join),
    st.sampled_from(["file:///", "file://", "demo:", "demo://host/", ""]),
)
def test_a_path_never_leads_out_of_its_folder(rest: str, start: str) -> None:
    found = resource(start + rest)
    segments = found["path"].split("/")
    assert not {".", ".."} & set(segments)
    if found["normal"]:
        assert "" not in segments[1:-1]
        assert not {".", ".."} & set(found["uri"].replace("?", "/").replace("#", "/").split("/"))
