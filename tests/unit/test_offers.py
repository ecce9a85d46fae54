"""What is kept of what a server offers, and for whom."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from sidecar.offers import CHANGED, LISTINGS, MAX_CALLERS, MAX_TEMPLATES, METHODS, Offer, Offers
from sidecar.protocol.jsonrpc import JsonObject
from sidecar.protocol.methods import MethodTable
from tests.support.fakes import tool

TABLE = MethodTable.of()


def see(offers: Offers, offer: Offer, kind: str, *names: str, more: str | None = None) -> None:
    """The first page of a listing, the last one unless there is `more`."""
    listing = LISTINGS[kind]
    items = [{listing.item_name: each, "name": each} for each in names]
    page: JsonObject = {listing.items: items}
    offers.observe(offer, listing, None, {**page, "nextCursor": more} if more else page)


def test_the_methods_are_those_of_the_table() -> None:
    assert {kind: TABLE.rows[method].listing for kind, method in METHODS.items()} == LISTINGS
    assert all(method in TABLE.rows for method in CHANGED)


# ── Of each kind ──────────────────────────────────────────────────────────────────────────────────


def test_prompts_and_resources_are_known_as_tools_are() -> None:
    offers = Offers()
    offer = offers.shared
    for target, kind in (("tool", "tools"), ("prompt", "prompts")):
        assert offer.known(target, "a") is None
        see(offers, offer, kind, "a", more="2")
        assert [offer.known(target, name) for name in "ab"] == [True, None]
        see(offers, offer, kind, "a", "twice", "twice")
        assert [offer.known(target, name) for name in ("a", "b", "twice")] == [True, False, False]
    assert offer.known("task", "a") is None


def test_a_resource_is_known_by_its_uri_or_by_a_template() -> None:
    offers = Offers()
    offer = offers.shared

    def known(*uris: str) -> list[bool | None]:
        return [offer.known("resource", each) for each in uris]

    see(offers, offer, "resources", "a://1")
    assert known("a://1", "b://1") == [True, None]
    see(offers, offer, "resource_templates", "b://{x}", more="2")
    assert known("a://1", "b://1", "c://1") == [True, True, None]
    see(offers, offer, "resource_templates", "b://{x}")
    assert known("a://1", "b://1", "c://1") == [True, True, False]
    offer.resources.forget()
    assert known("a://1", "b://1", "c://1") == [None, True, None]


def test_a_server_without_templates_tells_all_by_its_resources() -> None:
    offers = Offers()
    offers.shared.templates.futile = True
    see(offers, offers.shared, "resources", "a://1")
    assert [offers.shared.known("resource", f"a://{each}") for each in (1, 2)] == [True, False]


def test_a_server_without_resources_tells_nothing() -> None:
    offers = Offers()
    offers.shared.resources.futile = True
    see(offers, offers.shared, "resource_templates", "b://{x}")
    assert [offers.shared.known("resource", uri) for uri in ("b://1", "a://1")] == [True, None]


def test_of_too_many_templates_none_is_looked_at() -> None:
    offers, enough = Offers(), [f"b{n}://{{x}}" for n in range(MAX_TEMPLATES)]
    see(offers, offers.shared, "resources", "a://1")
    see(offers, offers.shared, "resource_templates", *enough)
    assert offers.shared.known("resource", "b1://1") is True
    assert offers.shared.known("resource", "c://1") is False
    see(offers, offers.shared, "resource_templates", *enough, "b://{x}")
    uris = ("a://1", "b1://1", "c://1")
    assert [offers.shared.known("resource", uri) for uri in uris] == [True, None, None]


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("tools", {"prompts", "resources", "resource_templates"}),
        ("prompts", {"tools", "resources", "resource_templates"}),
        ("resources", {"tools", "prompts"}),
    ],
)
def test_a_change_makes_one_kind_be_forgotten(family: str, left: set[str]) -> None:
    offers = Offers()
    for kind in LISTINGS:
        see(offers, offers.shared, kind, "a")
    offers.shared.forget(family)
    assert {kind for kind in LISTINGS if offers.shared.of(kind).complete} == left


# ── Of each caller ────────────────────────────────────────────────────────────────────────────────


def test_each_caller_has_an_offer_of_their_own() -> None:
    offers = Offers()
    for caller, names in ((None, "s"), ("ana", "ab"), ("bob", "bc")):
        see(offers, offers.to(caller), "tools", *names)
    found = {
        caller: [offers.to(caller).known("tool", name) for name in "abcs"]
        for caller in (None, "ana", "bob", "eve")
    }
    assert found == {
        None: [False, False, False, True],
        "ana": [True, True, False, False],
        "bob": [False, True, True, False],
        "eve": [None] * 4,
    }
    offers.forget("ana")
    assert offers.to("ana").known("tool", "a") is None
    assert offers.to("bob").known("tool", "b") is True


def test_those_who_came_last_are_remembered() -> None:
    offers = Offers()
    for number in range(MAX_CALLERS):
        see(offers, offers.to(number), "tools", "a")
    offers.to(0)
    offers.to("one more")
    assert len(list(offers)) == MAX_CALLERS + 1
    assert [offers.to(each).known("tool", "a") for each in (0, 2)] == [True, True]
    assert offers.to(1).known("tool", "a") is None


def test_what_many_are_shown_alike_is_kept_once() -> None:
    offers, listing = Offers(), LISTINGS["tools"]
    for number in range(10):
        page = {"tools": [tool("a"), tool("b", description=str(number))]}
        offers.observe(offers.to(number), listing, None, page)
    shown = [offers.to(number).tools for number in range(10)]
    assert len({id(each.look_up("a").tool) for each in shown}) == 1
    assert len({id(each.look_up("b").tool) for each in shown}) == 10
    for number in range(10):
        offers.forget(number)
    del shown
    gc.collect()
    assert len(offers._kept) == 0


# ── Pins and figures ──────────────────────────────────────────────────────────────────────────────


def digests(offers: Offers, caller: Any = None) -> dict[str, str]:
    return {each.name: each.digest for each in offers.to(caller).tools}


def test_pins_are_those_of_every_caller_also_of_those_to_come() -> None:
    offers = Offers()
    page = {"tools": [tool("a")]}
    offers.observe(offers.to("ana"), LISTINGS["tools"], None, page)
    offers.pins = digests(offers, "ana")
    offers.observe(offers.to("bob"), LISTINGS["tools"], None, page)
    assert [offers.to(each).tools.look_up("a").pinned for each in ("ana", "bob")] == [True, True]
    offers.pins = None
    assert [offers.to(each).tools.look_up("a").pinned for each in ("ana", "bob")] == [None, None]


def test_figures_count_a_definition_once() -> None:
    offers, listing = Offers(), LISTINGS["tools"]
    assert (offers.tools(), offers.unpinned(), offers.complete()) == (0, 0, False)
    for caller in ("ana", "bob"):
        page = {"tools": [tool("a"), tool("b", description=caller)]}
        offers.observe(offers.to(caller), listing, None, page)
    assert (offers.tools(), offers.unpinned(), offers.complete()) == (3, 0, True)
    offers.pins = digests(offers, "ana")
    assert offers.unpinned() == 1
    offers.to("eve")
    assert not offers.complete()
