"""Every official client sees the same with the sidecar between, over each transport and bridge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import CELLS
from tests.clients.matrix import (
    CLIENTS,
    DIRECT,
    EXPECTED,
    LEGACY,
    MODERN,
    WAYS,
    Client,
    Matrix,
    Way,
    differences,
    expected_of,
    matrix,
)

pytestmark = pytest.mark.timeout(200)

by_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda each: each.name.replace(" ", "-"))
CELLS_OF_ALL = [
    pytest.param(client, way, id=f"{client.name}, {way.name}".replace(" ", "-"))
    for client in CLIENTS
    for way in WAYS
    if way.takes(client)
]


@pytest.fixture(scope="module")
def tours(node_parts: Path, opa_bin: Path) -> Iterator[Matrix]:
    with matrix(node_parts, opa_bin) as started:
        yield started


def text(of: Any) -> str:
    """The text of a tool's result."""
    return str(of["content"][0]["text"])


# ── The tour shows what it should, or that nothing differs would say nothing ──────────────────────


@by_client
@pytest.mark.parametrize("transport", ["http", "sse", "stdio"])
def test_without_the_sidecar_every_step_does_what_it_is_for(
    tours: Matrix, client: Client, transport: str
) -> None:
    seen = tours.seen(client)[DIRECT + transport]
    handshake = client.revision in LEGACY
    assert seen["revision"] == seen["connects again"][0] == client.revision
    assert not [step for step, outcome in seen.items() if "raises" in str(outcome)]
    tools = [tool["name"] for page in seen["tools"] for tool in page["tools"]]
    assert len(tools) == len(set(tools)) > 20
    assert seen["error"]["isError"]
    assert text(seen["unknown tool"]) == "Unknown tool: no_such_tool"
    assert seen["unknown resource"]["error"]["code"] == -32602
    assert text(seen["progress"][0]) == "nobody cancelled it"
    assert len(seen["progress"][1]) == len(seen["log"][1]) == 3
    assert text(seen["cancel"]) == "cancelled"
    assert {"notifications/resources/updated", "notifications/tools/list_changed"} <= {
        *seen["events"]
    }
    assert text(seen["polling"]) == "here after the reconnection"
    assert sum(len(seen[step][1]) for step in seen if step.startswith("asked by")) >= 2
    assert seen["session"] == (404 if handshake and transport == "http" else None)


# ── The claim ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("client", "way"), CELLS_OF_ALL)
def test_with_the_sidecar_between_the_client_sees_the_same(
    tours: Matrix, client: Client, way: Way
) -> None:
    verdict = tours.verdict(way, client)
    CELLS.setdefault(client, {})[way.name] = verdict.cell
    assert not verdict.wrong, "\n".join(verdict.wrong)


@pytest.mark.parametrize(("client", "way"), CELLS_OF_ALL)
def test_the_revision_is_the_same_where_both_sides_can_speak_it(
    tours: Matrix, client: Client, way: Way
) -> None:
    row = expected_of(way, client)
    if row is None or not (row.like or row.refused):
        assert tours.seen(client)[way.name]["revision"] == client.revision


# ── What counts as a difference ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("without", "through", "different"),
    [
        pytest.param({"call": [1, {"a": 2}]}, {"call": [1, {"a": 2}]}, False, id="same"),
        pytest.param({"call": [1, 2]}, {"call": [2, 1]}, True, id="another order"),
        pytest.param({"call": 1}, {}, True, id="a step less"),
        pytest.param({}, {"call": 1}, True, id="a step more"),
        pytest.param({"call": None}, {}, True, id="nothing is not none"),
        pytest.param({"call": {"error": {}}}, {"call": {}}, True, id="no error"),
    ],
)
def test_what_counts(without: dict[str, Any], through: dict[str, Any], different: bool) -> None:
    assert bool(differences(without, through)) is different


def test_every_expected_difference_is_of_a_cell_that_is_there() -> None:
    cells = {(way.name, each.mode) for each in CLIENTS for way in WAYS if way.takes(each)}
    assert {(each.way, each.mode) for each in EXPECTED} <= cells


def test_every_revision_has_clients() -> None:
    assert {each.revision for each in CLIENTS} == {*LEGACY, MODERN}
