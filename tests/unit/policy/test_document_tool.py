"""What the question says of a target beyond its name: whether it is known, pins, resources."""

from __future__ import annotations

import pytest

from sidecar.policy.document import Facts, build, build_listing, build_relisting
from sidecar.protocol.catalog import Lookup, Tool, digest, read_entry, read_tool
from sidecar.protocol.jsonrpc import JsonObject, Request
from tests.support.fakes import ANA, tool
from tests.unit.policy.test_document import ENVIRONMENT, VALID, receive


def test_a_call_says_whether_the_tool_is_pinned_and_what_it_acts_on() -> None:
    operation = receive(Request(1, "tools/call", {"name": "t"}))
    for pinned in (True, False):
        lookup = Lookup(True, Tool("t", {}, "d"), pinned)
        found = Facts(tool=lookup, resource="ticket:1", arguments_valid=not pinned)
        question = build(operation, operation.targets[0], ANA, ENVIRONMENT, found)
        VALID.validate(question)
        told = question["tool"]
        assert (told["pinned"], told["resource"]) == (pinned, "ticket:1")
        assert told["arguments_valid"] is not pinned


def test_listed_tools_are_judged_by_their_pins() -> None:
    items = [tool("a"), tool("b"), tool("c"), {"title": "no name"}]
    listing = receive(Request(1, "tools/list")).method.listing
    assert listing is not None
    pins = {"a": digest(items[0]), "b": digest(items[0])}
    question = build_listing(
        receive(Request(1, "tools/list")), listing, items, ANA, ENVIRONMENT, tasks={}, pins=pins
    )
    VALID.validate(question)
    assert [each["pinned"] for each in question["listing"]["items"]] == [True, False, False, False]


@pytest.mark.parametrize("known", [True, False, None])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("prompt", Request(1, "prompts/get", {"name": "p"})),
        ("resource", Request(1, "resources/read", {"uri": "file:///a"})),
        ("resource", Request(1, "resources/read", {"uri": "http://[broken"})),
        ("resource", Request(1, "resources/subscribe", {"uri": "file:///a"})),
    ],
)
def test_whether_a_prompt_or_resource_is_known_is_said_or_left_open(
    target: str, message: Request, known: bool | None
) -> None:
    operation = receive(message)
    question = build(operation, operation.targets[0], ANA, ENVIRONMENT, Facts(known=known))
    VALID.validate(question)
    assert question[target].get("known") is known
    assert ("known" in question[target]) == (known is not None)


@pytest.mark.parametrize(
    ("method", "items"),
    [
        ("tools/list", [tool("a", annotations={"readOnlyHint": True}), tool("b")]),
        ("prompts/list", [{"name": "a", "description": "Asks."}, {"name": "b"}]),
        ("resources/list", [{"uri": "a://1", "name": "One"}]),
        ("resources/templates/list", [{"uriTemplate": "a://{x}", "name": "Any"}]),
    ],
)
def test_a_catalog_is_asked_about_as_the_listing_was(method: str, items: list[JsonObject]) -> None:
    operation = receive(Request(1, method))
    listing, pins = operation.method.listing, {"a": digest(items[0]), "b": "sha256:other"}
    assert listing is not None
    first = build_listing(operation, listing, items, ANA, ENVIRONMENT, tasks={}, pins=pins)
    read = [
        read_tool(each) if method == "tools/list" else read_entry(listing, each) for each in items
    ]
    assert build_relisting(operation, listing, read, ANA, ENVIRONMENT, pins=pins) == first
