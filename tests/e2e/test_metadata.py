"""Protected resource metadata (RFC 9728): what a client asks for before it has a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import (
    ALLOW_ALL,
    Served,
    get,
    http_sidecar,
    patient,
    ticket_desk,
)
from tests.support.raw import initialize, post
from tests.support.ticket_desk import TOKEN

WELL_KNOWN = "/.well-known/oauth-protected-resource"
RESOURCE = "https://tickets.example/mcp"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Served]:
    """A server that wants a token."""
    with ticket_desk(tmp_path / "log", "--resource", RESOURCE) as served:
        yield served


@pytest.fixture
def front(desk: Served, opa_bin: Path) -> Iterator[Served]:
    options = ("--policy", ALLOW_ALL, "--actor", "human:ana")
    with http_sidecar(desk.url, *options, env=patient(opa_bin)) as served:
        yield served


def beside(url: str, path: str) -> str:
    return url.removesuffix("/mcp") + path


def test_the_document_is_the_servers_own(desk: Served, front: Served) -> None:
    for path in (f"{WELL_KNOWN}/mcp", WELL_KNOWN):
        assert get(beside(front.url, path)) == get(beside(desk.url, path)), path
    status, body = get(beside(front.url, f"{WELL_KNOWN}/mcp"))
    assert (status, json.loads(body)["resource"]) == (200, RESOURCE)


def test_a_client_without_a_token_is_told_where_to_look(desk: Served, front: Served) -> None:
    refused = [post(each.url, initialize()) for each in (desk, front)]
    told = [dict(each.headers)["www-authenticate"] for each in refused]
    assert [each.status for each in refused] == [401, 401]
    assert told[0] == told[1]
    assert f'resource_metadata="https://tickets.example{WELL_KNOWN}/mcp"' in told[1]


def test_a_token_goes_on_to_the_server(front: Served) -> None:
    assert post(front.url, initialize(), [("Authorization", f"Bearer {TOKEN}")]).status == 200
    assert post(front.url, initialize(), [("Authorization", "Bearer other")]).status == 401


def test_no_other_path_is_opened_by_it(front: Served) -> None:
    for path in (f"{WELL_KNOWN}/other", f"{WELL_KNOWN}/mcp/", "/.well-known/openid-configuration"):
        assert get(beside(front.url, path))[0] == 404, path
    assert post(beside(front.url, f"{WELL_KNOWN}/mcp"), initialize()).status == 405


def test_a_server_that_is_away_has_no_metadata(desk: Served, front: Served) -> None:
    desk.process.stop()
    assert get(beside(front.url, f"{WELL_KNOWN}/mcp"))[0] == 502
