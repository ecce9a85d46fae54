"""The file of pins, and what it says has changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ConfigError
from sidecar.protocol.catalog import Catalog, digest, read_tool
from sidecar.protocol.pins import Pins, differences, pin, read, write
from tests.support.fakes import tool

PINNED = pin("desk", [tool("get", description="Gets."), tool("make")])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def headings(*found: Any) -> list[str]:
    return [each for each in differences(PINNED, pin("", found)) if not each.startswith(" ")]


def file(**changes: Any) -> bytes:
    return json.dumps({**json.loads(write(PINNED)), **changes}).encode()


def test_the_file_is_sorted_and_in_ascii() -> None:
    text = write(pin("Büro", [tool("b", title="\u202e"), tool("a")]))
    assert text.isascii()
    assert text.endswith("}\n")
    assert list(json.loads(text)["tools"]) == ["a", "b"]
    assert text == write(pin("Büro", [tool("a"), tool("b", title="\u202e")]))


@given(st.dictionaries(st.text(max_size=5), values, max_size=4), st.text(max_size=5))
def test_what_is_written_is_read_again(fields: dict[str, Any], server: str) -> None:
    pins = pin(server, [{**fields, "name": "a"}, tool("b")])
    assert read(write(pins).encode()) == pins
    assert list(differences(pins, read(write(pins).encode()))) == []


def test_the_digest_is_that_of_the_catalog() -> None:
    catalog = Catalog(pins=PINNED.digests)
    catalog.observe(None, map(read_tool, PINNED.tools.values()), None)
    assert [catalog.look_up(name).pinned for name in ("get", "make")] == [True, True]


def test_two_tools_of_one_name_are_not_pinned() -> None:
    with pytest.raises(ConfigError, match="two tools 'a'"):
        pin("desk", [tool("a"), tool("a")])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"version": 1, "version": 1}', "no JSON"),
        (b"[]", "no pins of version 1"),
        (file(version=2), "no pins of version 1"),
        (file(tools=[]), "no pins of version 1"),
        (file(tools={"get": None}), "tools.get: needs"),
        (file(tools={"get": {"digest": "sha256:0"}}), "tools.get: needs"),
        (file(tools={"get": {"definition": {}, "digest": digest({})}}), "tools.get: needs"),
        (file(tools={"get": {"definition": tool("get")}}), "tools.get: the digest"),
        (file(tools={"get": {"definition": tool("get"), "digest": 1}}), "tools.get: the digest"),
        (
            file(tools={"get": {"definition": tool("put"), "digest": digest(tool("put"))}}),
            "tools.get: the digest",
        ),
        (
            file(tools={"get": {"definition": tool("get", x=1), "digest": digest(tool("get"))}}),
            "tools.get: the digest",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(content)


def test_no_tools_are_pins_too() -> None:
    assert read(write(Pins("", {})).encode()).digests == {}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([tool("make"), tool("get", description="Gets.")], []),
        ([tool("get", description="Gets.")], ["removed: make"]),
        ([*PINNED.tools.values(), tool("new")], ["added: new"]),
        ([tool("get", description="Gets!"), tool("make")], ["changed: get (description)"]),
        ([tool("get"), tool("make")], ["changed: get (description)"]),
        (
            [tool("get", description="Gets.", annotations={}), {"name": "make", "inputSchema": {}}],
            ["changed: get (annotations)", "changed: make (inputSchema)"],
        ),
        ([], ["removed: get", "removed: make"]),
    ],
)
def test_what_has_changed(found: list[Any], said: list[str]) -> None:
    assert headings(*found) == said


def test_a_field_that_became_null_is_named() -> None:
    assert headings(tool("get", description="Gets."), tool("make", title=None)) == [
        "changed: make (title)"
    ]


def test_the_lines_show_what_is_hidden() -> None:
    lines = list(
        differences(PINNED, pin("", [tool("get", description="G\u200bets."), tool("make")]))
    )
    assert '  -  "description": "Gets.",' in lines
    assert '  +  "description": "G\\u200bets.",' in lines
    assert not any("+++" in each or "---" in each for each in lines)
