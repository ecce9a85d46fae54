"""Which endpoints belong to the server that was dialled."""

from __future__ import annotations

import pytest

from sidecar.errors import UpstreamError
from sidecar.transport.upstream import HttpUpstream


def sibling(base: str, reference: str) -> str:
    upstream = HttpUpstream(base, connect=1, response=None, message_limit=1)
    return str(upstream.sibling(reference)._url)


@pytest.mark.parametrize(
    ("base", "reference", "expected"),
    [
        ("http://a:1/sse", "/m?s=1", "http://a:1/m?s=1"),
        ("http://a:1/x/sse", "m?s=1", "http://a:1/x/m?s=1"),
        ("http://a:1/sse", "?s=1", "http://a:1/sse?s=1"),
        ("http://a:1/sse", "http://a:1/m", "http://a:1/m"),
        ("http://a/sse", "http://A:80/m", "http://A/m"),
        ("https://a/sse", "//a:443/m", "https://a/m"),
        ("http://[::1]:1/sse", "http://[::1]:1/m", "http://[::1]:1/m"),
        ("http://a:1/sse", "/m?s=a%2Fb+c%20d", "http://a:1/m?s=a%2Fb+c%20d"),
        ("http://a:1/sse", "/../../m", "http://a:1/m"),
        ("http://a:1/sse", "/\\evil", "http://a:1/%5Cevil"),
    ],
)
def test_an_endpoint_of_the_same_server(base: str, reference: str, expected: str) -> None:
    assert sibling(base, reference) == expected


@pytest.mark.parametrize(
    "reference",
    [
        "http://b:1/m",
        "http://a:2/m",
        "http://a/m",
        "https://a:1/m",
        "//b/m",
        "//b:1/m",
        "///b/m:1",
        "http://a.b:1/m",
        "http://u@a:1/m",
        "http://u:p@a:1/m",
        "http://a:1@b/m",
        "http://a:99999/m",
        "http://[/m",
        "unix:///run/x",
        "data:,x",
        "javascript:x",
        "mailto:a@b",
    ],
)
def test_an_endpoint_of_somebody_else_is_refused(reference: str) -> None:
    if reference == "///b/m:1":  # an empty authority is none
        assert sibling("http://a:1/sse", reference).startswith("http://a:1/")
        return
    with pytest.raises(UpstreamError):
        sibling("http://a:1/sse", reference)
