"""The table of methods against the catalogue of the five revisions, written down a second time."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest

from sidecar.protocol.methods import (
    CLIENT_HOSTED,
    LEGACY_REVISIONS,
    MODERN_REVISION,
    REVISIONS,
    ROUTING_HEADERS,
    Direction,
    Era,
    Governed,
    Method,
    MethodTable,
)

TABLE = MethodTable.of()
CLIENT, SERVER = Direction.FROM_CLIENT, Direction.FROM_SERVER
DECISION, LISTING, NEGOTIATION, PASSES = (
    Governed.DECISION,
    Governed.LISTING,
    Governed.NEGOTIATION,
    Governed.TABLE,
)

# a 2024-11-05, b 2025-03-26, c 2025-06-18, d 2025-11-25, e 2026-07-28 and its extensions.
REQUESTS_OF_CLIENTS = {
    "initialize": ("abcd", NEGOTIATION, "negotiation"),
    "server/discover": ("e", NEGOTIATION, "negotiation"),
    "ping": ("abcd", PASSES, None),
    "tools/list": ("abcde", LISTING, "listing"),
    "tools/call": ("abcde", DECISION, "tool"),
    "resources/list": ("abcde", LISTING, "listing"),
    "resources/templates/list": ("abcde", LISTING, "listing"),
    "resources/read": ("abcde", DECISION, "resource"),
    "resources/subscribe": ("abcd", DECISION, "resource"),
    "resources/unsubscribe": ("abcd", DECISION, "resource"),
    "subscriptions/listen": ("e", DECISION, "subscription"),
    "prompts/list": ("abcde", LISTING, "listing"),
    "prompts/get": ("abcde", DECISION, "prompt"),
    "completion/complete": ("abcde", DECISION, "completion"),
    "logging/setLevel": ("abcd", PASSES, None),
    "tasks/get": ("de", DECISION, "task"),
    "tasks/result": ("d", DECISION, "task"),
    "tasks/list": ("d", LISTING, "listing"),
    "tasks/cancel": ("de", DECISION, "task"),
    "tasks/update": ("e", DECISION, "task"),
}
REQUESTS_OF_SERVERS = {
    "sampling/createMessage": ("abcde", DECISION, "sampling"),
    "roots/list": ("abcde", DECISION, "roots"),
    "elicitation/create": ("cde", DECISION, "elicitation"),
    "ping": ("abcd", PASSES, None),
    "tasks/get": ("d", PASSES, None),
    "tasks/result": ("d", PASSES, None),
    "tasks/list": ("d", PASSES, None),
    "tasks/cancel": ("d", PASSES, None),
}
NOTIFICATIONS_OF_CLIENTS = {
    "notifications/initialized": "abcd",
    "notifications/cancelled": "abcde",
    "notifications/progress": "abcde",
    "notifications/roots/list_changed": "abcd",
    "notifications/tasks/status": "d",
}
NOTIFICATIONS_OF_SERVERS = {
    "notifications/cancelled": "abcde",
    "notifications/progress": "abcde",
    "notifications/message": "abcde",
    "notifications/tools/list_changed": "abcde",
    "notifications/prompts/list_changed": "abcde",
    "notifications/resources/list_changed": "abcde",
    "notifications/resources/updated": "abcde",
    "notifications/subscriptions/acknowledged": "e",
    "notifications/tasks/status": "d",
    "notifications/tasks": "e",
    "notifications/elicitation/complete": "d",
}
HEADERS = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "tasks/get": "taskId",
    "tasks/update": "taskId",
    "tasks/cancel": "taskId",
}

Kind = Literal["request", "notification"]
Row = tuple[str, Governed, str | None]
CATALOGUE: dict[tuple[Kind, Direction], dict[str, Row]] = {
    ("request", CLIENT): dict(REQUESTS_OF_CLIENTS),
    ("request", SERVER): dict(REQUESTS_OF_SERVERS),
    ("notification", CLIENT): {k: (v, PASSES, None) for k, v in NOTIFICATIONS_OF_CLIENTS.items()},
    ("notification", SERVER): {k: (v, PASSES, None) for k, v in NOTIFICATIONS_OF_SERVERS.items()},
}
NAMES = sorted({name for rows in CATALOGUE.values() for name in rows} | set(TABLE.rows))
CASES = [
    pytest.param(name, kind, direction, era, id=f"{name}-{kind}-{direction.value}-{era.value}")
    for name, (kind, direction), era in itertools.product(NAMES, CATALOGUE, Era)
]


@pytest.mark.parametrize(("name", "kind", "direction", "era"), CASES)
def test_a_method_is_known_where_the_catalogue_has_it(
    name: str, kind: Kind, direction: Direction, era: Era
) -> None:
    revisions, governed, target = CATALOGUE[kind, direction].get(name, ("", None, None))
    row = TABLE.find(name, kind, direction, era)
    if not set(revisions) & set("e" if era is Era.MODERN else "abcd"):
        assert row is None
        return
    assert row is not None
    assert (row.name, row.kind, row.governed, row.target) == (name, kind, governed, target)
    assert row.revisions == tuple(REVISIONS["abcde".index(each)] for each in revisions)


@pytest.mark.parametrize("row", TABLE.rows.values(), ids=lambda row: row.name)
def test_a_row_is_whole(row: Method) -> None:
    assert (row.listing is not None) == (row.governed is Governed.LISTING)
    assert (row.target is None) == (row.governed is Governed.TABLE)
    assert row.kind == "request" or row.governed is Governed.TABLE
    assert row.header == (row.name in HEADERS)
    if row.header:
        assert row.subject == (HEADERS[row.name],)


def test_nothing_that_reaches_a_server_passes_by_the_table_but_what_does_no_harm() -> None:
    passing = {
        row.name
        for row in TABLE.rows.values()
        if row.governed is Governed.TABLE and row.kind == "request" and row.sent_by(CLIENT)
    }
    assert passing == {"ping", "logging/setLevel"}


@pytest.mark.parametrize(
    "name",
    ["", "tools/Call", "TOOLS/CALL", "tools/call ", "tools", "ui/open", "rpc.discover", "_OTHER"],
)
def test_what_nobody_wrote_down_is_unknown(name: str) -> None:
    for (kind, direction), era in itertools.product(CATALOGUE, Era):
        assert TABLE.find(name, kind, direction, era) is None


def test_a_declared_method_is_judged_by_its_name_both_ways_in_both_eras() -> None:
    table = MethodTable.of(["acme/reindex"])
    for direction, era in itertools.product(Direction, Era):
        row = table.find("acme/reindex", "request", direction, era)
        assert row is not None
        assert (row.governed, row.target) == (Governed.DECISION, "method")
        assert table.find("acme/reindex", "notification", direction, era) is None


def test_a_declaration_overrides_no_row() -> None:
    declared = MethodTable.of(sorted(TABLE.rows))
    assert declared == TABLE


def test_tasks_that_a_client_hosts_are_asked_after_by_servers_alone() -> None:
    for name, row in CLIENT_HOSTED.items():
        assert row.sent_by(SERVER)
        assert not row.sent_by(CLIENT)
        assert TABLE.find(name, "request", CLIENT, Era.LEGACY) is not row


def test_listings_say_where_their_items_are() -> None:
    assert {
        row.name: (row.listing.kind, row.listing.items, row.listing.item_name)
        for row in TABLE.rows.values()
        if row.listing
    } == {
        "tools/list": ("tools", "tools", "name"),
        "resources/list": ("resources", "resources", "uri"),
        "resources/templates/list": ("resource_templates", "resourceTemplates", "uriTemplate"),
        "prompts/list": ("prompts", "prompts", "name"),
        "tasks/list": ("tasks", "tasks", "taskId"),
    }


def test_the_last_revision_alone_is_modern() -> None:
    assert {MODERN_REVISION} | LEGACY_REVISIONS == set(REVISIONS)
    assert max(REVISIONS) == MODERN_REVISION
    assert ROUTING_HEADERS == ("MCP-Protocol-Version", "Mcp-Method", "Mcp-Name")
