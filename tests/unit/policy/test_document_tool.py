"""What the question says of a tool beyond its name: its pins, and what a call acts on."""

from __future__ import annotations

from sidecar.policy.document import Facts, build, build_listing
from sidecar.protocol.catalog import Lookup, Tool, digest
from sidecar.protocol.jsonrpc import Request
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
