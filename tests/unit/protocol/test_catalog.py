"""What is known of a name, as the pages of listings come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.protocol.catalog import (
    MAX_CHAINS,
    MAX_ITEMS,
    Catalog,
    Tool,
    digest,
    is_tool,
    is_well_annotated,
    read_page,
    read_tool,
)
from sidecar.protocol.mirror import Mirror


def tools(names: str, mark: str = "") -> list[Tool]:
    return [Tool(name, {}, f"{name}{mark}") for name in names]


def known(catalog: Catalog, names: str) -> list[bool | None]:
    return [catalog.look_up(name).known for name in names]


def test_of_an_empty_catalog_nothing_can_be_said() -> None:
    assert known(Catalog(), "ab") == [None, None]


def test_one_page_without_cursor_is_everything() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("ab"), None)
    assert catalog.complete
    assert known(catalog, "abc") == [True, True, False]
    assert catalog.look_up("a").tool == Tool("a", {}, "a")


def test_before_the_last_page_a_name_not_seen_is_undecided() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("a"), "1")
    assert known(catalog, "ac") == [True, None]
    catalog.observe("1", tools("b"), "2")
    assert known(catalog, "abc") == [True, True, None]
    catalog.observe("2", tools("d"), None)
    assert known(catalog, "abcd") == [True, True, False, True]


@pytest.mark.parametrize(
    "pages",
    [
        pytest.param(["aa"], id="on one page"),
        pytest.param(["a", "ba"], id="on two pages"),
        pytest.param(["a", "b", "", "a"], id="far apart"),
        pytest.param(["aaa"], id="three times"),
    ],
)
def test_a_name_listed_twice_is_unknown(pages: list[str]) -> None:
    catalog = Catalog()
    for number, page in enumerate(pages):
        last = number == len(pages) - 1
        catalog.observe(
            str(number) if number else None, tools(page), None if last else str(number + 1)
        )
    assert known(catalog, "a") == [False]
    assert catalog.look_up("a").tool is None
    assert all(known(catalog, "b")) or not any("b" in page for page in pages)


def test_a_name_listed_twice_is_unknown_before_the_last_page_too() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("aa"), "1")
    assert known(catalog, "a") == [False]


def test_two_listings_of_the_same_tool_are_not_twice() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("ab"), "1")
    catalog.observe(None, tools("ab"), "1")
    assert known(catalog, "ab") == [True, True]


def test_interleaved_listings_are_each_followed() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("a"), "x1")
    catalog.observe(None, tools("p"), "y1")
    catalog.observe("x1", tools("b"), "x2")
    catalog.observe("y1", tools("q"), None)
    assert catalog.complete
    assert known(catalog, "apqb") == [False, True, True, False]
    catalog.observe("x2", tools("c"), None)
    assert known(catalog, "abcpq") == [True, True, True, False, False]


def test_a_page_in_the_middle_completes_nothing() -> None:
    catalog = Catalog()
    catalog.observe("7", tools("z"), None)
    assert not catalog.complete
    assert known(catalog, "az") == [None, True]


def test_a_page_in_the_middle_changes_no_complete_catalog() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("ab"), None)
    catalog.observe("7", tools("z"), None)
    catalog.observe(None, tools("y"), "1")
    assert known(catalog, "abyz") == [True, True, False, False]


def test_a_later_listing_replaces_the_earlier() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("aab"), None)
    catalog.observe(None, tools("ac", mark="!"), None)
    assert known(catalog, "abc") == [True, False, True]
    assert catalog.look_up("a").tool == Tool("a", {}, "a!")


def test_a_cursor_is_followed_once() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("a"), "1")
    catalog.observe("1", tools("b"), None)
    catalog.observe("1", tools("c"), None)
    assert known(catalog, "abc") == [True, True, False]


def test_a_definition_on_any_page_is_in_force_at_once() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("ab"), None)
    for cursor, page, more, mark in ((None, "a", "1", "!"), ("7", "b", None, "?")):
        catalog.observe(cursor, tools(page, mark), more)
        assert catalog.look_up(page).tool == Tool(page, {}, page + mark)
    assert known(catalog, "ab") == [True, True]


def test_a_page_that_was_seen_earlier_does_not_bring_its_definition_back() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("a"), "1")
    catalog.observe(None, tools("ab", mark="!"), None)
    catalog.observe("1", tools("b", mark="!"), None)
    assert catalog.look_up("a").tool == Tool("a", {}, "a!")


def test_a_name_that_a_page_lists_twice_is_unknown_at_once() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("ab"), None)
    catalog.observe(None, tools("aa"), "1")
    assert known(catalog, "ab") == [False, True]


def test_without_pins_nothing_is_pinned_or_not() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("a"), None)
    assert [catalog.look_up(name).pinned for name in "ab"] == [None, None]
    assert catalog.unpinned() == 0


def test_a_tool_is_pinned_while_it_is_what_it_was_then() -> None:
    catalog = Catalog(pins={"a": "a", "b": "b", "gone": "gone"})
    catalog.observe(None, tools("abc"), None)
    assert [catalog.look_up(name).pinned for name in "abcx"] == [True, True, False, None]
    assert catalog.unpinned() == 1
    catalog.observe(None, tools("a", mark="!"), "1")
    assert [catalog.look_up(name).pinned for name in "abc"] == [False, True, False]
    assert catalog.unpinned() == 2
    catalog.pins = {"a": "a!", "b": "b", "c": "c"}
    assert [catalog.look_up(name).pinned for name in "abc"] == [True, True, True]


def test_no_tool_is_pinned_by_an_empty_file() -> None:
    catalog = Catalog(pins={})
    catalog.observe(None, tools("a"), None)
    assert catalog.look_up("a").pinned is False


def test_a_name_listed_twice_is_neither() -> None:
    catalog = Catalog(pins={"a": "a"})
    catalog.observe(None, tools("aa"), None)
    assert catalog.look_up("a").pinned is None


def test_after_a_change_nothing_is_known_until_it_is_listed_again() -> None:
    catalog = Catalog()
    catalog.observe(None, tools("aab"), None)
    catalog.observe(None, tools("x"), "1")
    catalog.forget()
    assert not catalog.complete
    assert known(catalog, "abx") == [None, None, None]
    catalog.observe("1", tools("y"), None)
    assert not catalog.complete
    catalog.observe(None, tools("ab"), None)
    assert known(catalog, "abx") == [True, True, False]


def test_listings_that_nobody_ends_do_not_fill_the_memory() -> None:
    catalog = Catalog()
    for number in range(MAX_CHAINS + 1):
        catalog.observe(None, tools("a"), str(number))
    catalog.observe("0", tools("b"), None)
    assert not catalog.complete
    catalog.observe("1", tools("b"), None)
    assert catalog.complete


def test_more_than_can_be_kept_stays_unknown_and_is_not_waited_for() -> None:
    catalog, half = Catalog(), MAX_ITEMS // 2 + 1
    first, second = ([Tool(f"{letter}{n}", {}, "d") for n in range(half)] for letter in "ab")
    catalog.observe(None, first, "1")
    assert (catalog.complete, catalog.futile) == (False, False)
    catalog.observe("1", second, None)
    assert (catalog.complete, catalog.futile, catalog.known()) == (False, True, MAX_ITEMS)
    names = ("a0", "b0", f"b{half - 1}", "c")
    assert [catalog.look_up(name).known for name in names] == [True, True, None, None]
    catalog.observe(None, [Tool("b0", {}, "e")], "2")
    found = catalog.look_up("b0").tool
    assert found is not None
    assert found.digest == "e"
    catalog.observe(None, tools("ab"), None)
    assert (catalog.complete, catalog.futile, catalog.known()) == (True, False, 2)


def test_one_that_is_asked_for_in_vain_is_not_for_ever() -> None:
    catalog = Catalog(futile=True)
    catalog.forget()
    assert not catalog.futile


NAMES = st.text("abcdef", max_size=4)


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_pages_say_the_same_as_one_page(pages: list[str]) -> None:
    paged, whole = Catalog(), Catalog()
    for number, page in enumerate(pages):
        last = number == len(pages) - 1
        paged.observe(
            str(number) if number else None, tools(page), None if last else str(number + 1)
        )
    whole.observe(None, tools("".join(pages)), None)
    assert known(paged, "abcdefg") == known(whole, "abcdefg")
    assert known(whole, "abcdefg") == ["".join(pages).count(name) == 1 for name in "abcdefg"]


@given(
    st.lists(
        st.tuples(st.none() | st.sampled_from("123"), NAMES, st.none() | st.sampled_from("123"))
    )
)
def test_no_order_of_pages_breaks_it(pages: list[tuple[str | None, str, str | None]]) -> None:
    catalog = Catalog()
    ever = "".join(page for _, page, _ in pages)
    for cursor, page, following in pages:
        catalog.observe(cursor, tools(page), following)
        assert all(catalog.look_up(name).known is not True or name in ever for name in "abcdefg")
        assert catalog.look_up("g").known is (False if catalog.complete else None)


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("result", "page"),
    [
        pytest.param({"tools": [{"name": "a"}]}, ([{"name": "a"}], None), id="the last page"),
        pytest.param({"tools": [], "nextCursor": "2"}, ([], "2"), id="an empty page"),
        pytest.param({"tools": [], "nextCursor": ""}, ([], ""), id="an empty cursor is one"),
        pytest.param({"tools": [], "nextCursor": None}, ([], None), id="no cursor"),
        pytest.param(
            {"tools": [1, {}, {"name": 1}, {"name": "a"}]}, ([{"name": "a"}], None), id="junk"
        ),
        pytest.param({"tools": {"a": {}}}, ([], None), id="no list"),
        pytest.param({}, ([], None), id="nothing"),
        pytest.param(None, ([], None), id="null"),
        pytest.param([], ([], None), id="a list"),
    ],
)
def test_a_page_is_read_as_far_as_it_is_one(result: object, page: tuple[object, object]) -> None:
    assert read_page(result) == page


def test_a_tool_is_remembered_with_its_hints_and_a_digest_of_all_of_it() -> None:
    item = {"name": "a", "annotations": {"readOnlyHint": True}, "description": "d"}
    found = read_tool(item)
    assert (found.name, found.annotations) == ("a", {"readOnlyHint": True})
    assert found.digest == digest(item)
    assert read_tool({**item, "description": "other"}).digest != found.digest
    assert read_tool({"name": "a", "annotations": "none"}).annotations == {}


@pytest.mark.parametrize(
    ("kind", "mirrors"), [("string", (Mirror(("x",), "Mcp-Param-X"),)), ("number", ())]
)
def test_the_arguments_that_headers_repeat_are_remembered_if_all_are_good(
    kind: str, mirrors: tuple[Mirror, ...]
) -> None:
    argument = {"type": kind, "x-mcp-header": "X"}
    item = {"name": "a", "inputSchema": {"type": "object", "properties": {"x": argument}}}
    assert read_tool(item).mirrors == mirrors
    assert is_well_annotated(item) is bool(mirrors)


@pytest.mark.parametrize("item", [None, 1, "a", [], {}, {"name": None}], ids=repr)
def test_what_has_no_name_is_no_tool(item: object) -> None:
    assert not is_tool(item)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param({"a": 1, "b": 2}, {"b": 2, "a": 1}, True, id="order of keys"),
        pytest.param([1, 2], [2, 1], False, id="order of items"),
        pytest.param({"a": "1"}, {"a": 1}, False, id="types"),
        pytest.param({"a": None}, {}, False, id="absent is not null"),
        pytest.param("é", "e\u0301", False, id="no Unicode folding"),
    ],
)
def test_a_digest_is_of_the_value(one: object, other: object, same: bool) -> None:
    assert (digest(one) == digest(other)) is same
    assert digest(one).startswith("sha256:")
    assert len(digest(one)) == 7 + 64
