"""Which schemas are understood, and what they say of arguments."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.protocol.validation import MAX_TOOLS, MAX_WEIGHT, MAX_WORK, NotKnown, Validation, weigh

ID = {"type": "integer", "minimum": 1}
TICKET = {"type": "object", "properties": {"id": ID}, "required": ["id"]}
BASE = {**TICKET, "$defs": {"id": ID}}


def valid(schema: Any, arguments: Any) -> bool | None:
    return Validation().valid("d", schema, arguments)


@pytest.mark.parametrize(
    ("schema", "arguments", "verdict"),
    [
        (TICKET, {"id": 1}, True),
        (TICKET, {"id": 1, "more": []}, True),
        (TICKET, {"id": 0}, False),
        (TICKET, {"id": "1"}, False),
        (TICKET, {"id": True}, False),
        (TICKET, {}, False),
        (TICKET, None, False),
        ({**TICKET, "additionalProperties": False}, {"id": 1, "x": 1}, False),
        ({}, {"anything": 1}, True),
        ({"properties": {"pattern": {"type": "string"}}}, {"pattern": 1}, False),
        ({"properties": {"format": {"enum": ["a", "b"]}}}, {"format": "c"}, False),
        ({"properties": {"id": {"$ref": "#/$defs/id"}}, "$defs": {"id": ID}}, {"id": 0}, False),
        (
            {"properties": {"id": {"$ref": "#/definitions/id"}}, "definitions": {"id": ID}},
            {"id": 1},
            True,
        ),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "required": ["a"]},
            {},
            False,
        ),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"b": 1}, True),
        ({"x-authzen-mapping": {"pattern": "("}, "required": ["a"]}, {}, False),
        ({"$defs": {"unused": {"pattern": "a"}}, "required": ["a"]}, {}, False),
    ],
)
def test_arguments_are_held_against_the_schema(schema: Any, arguments: Any, verdict: bool) -> None:
    assert valid(schema, arguments) is verdict


def chain(links: int) -> dict[str, Any]:
    """Each link is two of the next one: small to write, and no end to check."""
    defs: dict[str, Any] = {
        f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(links)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{links}": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param(None, id="none"),
        pytest.param([], id="no schema"),
        pytest.param(True, id="no object"),
        pytest.param({"type": "nonsense"}, id="a type that is none"),
        pytest.param({"minimum": "1"}, id="a bound that is none"),
        pytest.param({"properties": {"a": {"pattern": "(a+)+$"}}}, id="pattern"),
        pytest.param({"patternProperties": {"(a+)+$": {}}}, id="patternProperties"),
        pytest.param({"items": {"format": "date"}}, id="format"),
        pytest.param({"allOf": [{"uniqueItems": True}]}, id="uniqueItems"),
        pytest.param({"unevaluatedProperties": False}, id="unevaluatedProperties"),
        pytest.param({"$ref": "http://127.0.0.1:9/schema"}, id="a remote reference"),
        pytest.param({"$ref": "other.json"}, id="a relative reference"),
        pytest.param({"$ref": "#"}, id="itself"),
        pytest.param({"$ref": "#/$defs/a"}, id="a reference to nothing"),
        pytest.param({"$ref": 1}, id="a reference that is none"),
        pytest.param({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {}}}, id="an escaped reference"),
        pytest.param({"$dynamicRef": "#a"}, id="a dynamic reference"),
        pytest.param({"$id": "http://a/b"}, id="another base"),
        pytest.param({"$schema": "http://a/dialect"}, id="a dialect that nobody knows"),
        pytest.param(
            {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, id="a tree"
        ),
        pytest.param(
            {"$ref": "#/$defs/a", "$defs": {"a": {"pattern": "a"}}}, id="pattern, referred to"
        ),
        pytest.param(chain(30), id="a chain that doubles"),
        pytest.param({"enum": list(range(MAX_WEIGHT + 1))}, id="long"),
        pytest.param({"description": "x" * 70_000}, id="large"),
        pytest.param({"x": 1}, id="a keyword that nobody knows"),
    ],
)
def test_of_other_schemas_nothing_is_known_and_that_is_counted(schema: Any) -> None:
    validation = Validation()
    assert [validation.valid("d", schema, each) for each in ({}, {"a": 1})] == [None, None]
    assert validation.unchecked == 2


def test_a_schema_that_is_too_deep_is_not_known() -> None:
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"not": schema}
    assert valid(schema, {}) is None
    assert valid({"$defs": {"a": schema}}, {}) is None


def test_references_count_as_often_as_they_are_followed() -> None:
    assert weigh({}) == 1
    assert weigh(BASE) == weigh(TICKET) == 2
    assert weigh(chain(3)) == 30
    with pytest.raises(NotKnown):
        weigh(chain(12))


def test_more_values_than_can_be_compared_are_not_valid() -> None:
    schema = {"properties": {"ids": {"type": "array", "items": ID}}}
    assert valid(schema, {"ids": [1] * 100}) is True
    assert valid(schema, {"ids": [1] * MAX_WORK}) is False


def test_a_schema_is_compiled_once_for_each_digest() -> None:
    validation = Validation()
    assert validation.valid("d", TICKET, {}) is False
    assert validation.valid("d", {}, {}) is False
    assert validation.valid("e", {}, {}) is True
    for number in range(MAX_TOOLS):
        validation.valid(str(number), {}, {})
    assert validation.valid("d", {}, {}) is True
