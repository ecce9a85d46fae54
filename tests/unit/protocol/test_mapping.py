"""What a call acts on, by its arguments."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.protocol.mapping import TEMPLATE, fill, read_mapping

NESTED = {"desk": {"id": "d1"}, "id": 4711}


@pytest.mark.parametrize(
    ("template", "arguments", "resource"),
    [
        ("ticket:{id}", {"id": 4711}, "ticket:4711"),
        ("ticket:{id}", {"id": "4711"}, "ticket:4711"),
        ("ticket:{id}", {"id": 4711.0}, "ticket:4711"),
        ("ticket:{id}", {"id": -0.5}, "ticket:-0.5"),
        ("ticket:{id}", {"id": 2.0**60}, "ticket:1152921504606846976"),
        ("flag:{on}", {"on": True}, "flag:true"),
        ("flag:{on}", {"on": False}, "flag:false"),
        ("desk/{desk.id}/{id}", NESTED, "desk/d1/4711"),
        ("{id}{id}", {"id": "a"}, "aa"),
        ("the-desk", {}, "the-desk"),
        ("the-desk", None, "the-desk"),
        ("{größe}", {"größe": "ü"}, "%C3%BC"),
    ],
)
def test_a_resource(template: str, arguments: Any, resource: str) -> None:
    assert fill(template, arguments) == resource


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"id": None},
        {"id": ""},
        {"id": []},
        {"id": [1]},
        {"id": {}},
        {"ID": 1},
        [],
        None,
    ],
)
def test_without_a_scalar_there_is_none(arguments: Any) -> None:
    assert fill("ticket:{id}", arguments) is None
    assert fill("{desk}/{id}", {"desk": 1, "id": arguments}) is None


def test_a_path_goes_through_objects_alone() -> None:
    assert fill("t:{a.b}", {"a": "b"}) is None
    assert fill("t:{a.b}", {"a.b": 1}) is None
    assert fill("t:{a.b}", {"a": [{"b": 1}]}) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("4711:admin", "4711%3Aadmin"),
        ("../4712", "..%2F4712"),
        ("4711 ", "4711%20"),
        ("4711%20", "4711%2520"),
        ("{id}", "%7Bid%7D"),
        ("*", "%2A"),
        ("a\x00b\n", "a%00b%0A"),
        ("\ud800", "%ED%A0%80"),
        (r"\1\g<0>", "%5C1%5Cg%3C0%3E"),
    ],
)
def test_a_value_can_not_end_its_place(value: str, shown: str) -> None:
    assert fill("ticket:{id}", {"id": value}) == f"ticket:{shown}"


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_values_are_different_resources(first: str, second: str) -> None:
    pair = fill("{a}/{b}", {"a": first, "b": second})
    assert pair is not None
    assert re.fullmatch(r"[A-Za-z0-9_.~%-]+/[A-Za-z0-9_.~%-]+", pair)
    assert [unquote(each) for each in pair.split("/")] == [first, second]


@pytest.mark.parametrize(
    "template", ["ticket:{id}", "{a.b}", "desk", "a{b}c{d.e.f}", "file:///{path}?q={größe}"]
)
def test_a_template(template: str) -> None:
    assert re.fullmatch(TEMPLATE, template)


@pytest.mark.parametrize(
    "template", ["", "{", "}", "{}", "{a", "a}", "{.a}", "{a.}", "{a..b}", "{a b}", "a b", "{{a}}"]
)
def test_what_is_no_template(template: str) -> None:
    assert not re.fullmatch(TEMPLATE, template)


def schema(resource: Any) -> Any:
    return {"type": "object", "x-authzen-mapping": {"evaluation": {"resource": resource}}}


def test_what_the_server_declares() -> None:
    declared = {"type": "ticket", "id": "$params.arguments.id"}
    assert read_mapping(schema(declared)) == "ticket:{id}"
    nested = {"type": "ticket", "id": "$params.arguments.desk.id", "properties": {}}
    assert read_mapping(schema(nested)) == "ticket:{desk.id}"


@pytest.mark.parametrize(
    "declared",
    [
        None,
        {},
        schema(None),
        schema({}),
        schema({"type": "ticket"}),
        schema({"id": "$params.arguments.id"}),
        schema({"type": "$params.arguments.kind", "id": "$params.arguments.id"}),
        schema({"type": "a:b", "id": "$params.arguments.id"}),
        schema({"type": "{id}", "id": "$params.arguments.id"}),
        schema({"type": "ticket", "id": "4711"}),
        schema({"type": "ticket", "id": "$token.sub"}),
        schema({"type": "ticket", "id": "$params.arguments.id + '1'"}),
        schema({"type": "ticket", "id": "$params.arguments"}),
        schema({"type": "ticket", "id": 4711}),
        {"x-authzen-mapping": "ticket"},
        {"x-authzen-mapping": {"evaluations": []}},
    ],
)
def test_other_declarations_say_nothing(declared: Any) -> None:
    assert read_mapping(declared) is None


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_is_read_is_a_template(kind: str, path: str) -> None:
    found = read_mapping(schema({"type": kind, "id": f"$params.arguments.{path}"}))
    assert found is None or re.fullmatch(TEMPLATE, found)
