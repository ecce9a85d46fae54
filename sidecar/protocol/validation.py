"""Whether arguments are what a tool's schema says, where that can be told quickly.

Schema and arguments come from two strangers, and a check runs on the path of every call. So only
keywords whose cost is known are understood, and only references within the schema, each counted as
often as it is followed: nothing is fetched, and no pattern of a server meets a value of a client.
Any other schema is not known: nothing is said of its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from sidecar.protocol.session import Bounded

MAX_SCHEMA = 32 * 1024
MAX_DEPTH = 48
MAX_WEIGHT = 1000
MAX_WORK = 20_000
"""Schemas times values, the most that a check may compare; it is far below a second."""
MAX_TOOLS = 1000

# What holds data, schemas, or definitions that apply only where they are referred to.
_PLAIN = frozenset(
    {
        *("type", "enum", "const", "required", "dependentRequired"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains"),
        *("minProperties", "maxProperties", "$comment", "$schema", "title", "description"),
        *("default", "examples", "deprecated", "readOnly", "writeOnly"),
    }
)
_ONE = frozenset(
    {"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"}
)
_SEVERAL = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"properties", "dependentSchemas"})
_DEFINED = frozenset({"$defs", "definitions"})

Check = Callable[[Any], bool]


class NotKnown(Exception):
    """A schema of which the cost of a check can not be told."""


@dataclass(slots=True)
class Validation:
    """Compiled schemas, by the digest of the tool's definition. `unchecked` are calls without."""

    unchecked: int = 0
    _compiled: Bounded[str, tuple[Check, int] | None] = field(
        default_factory=lambda: Bounded(MAX_TOOLS)
    )

    def valid(self, digest: str, schema: Any, arguments: Any) -> bool | None:
        """Whether the arguments are valid; None when that can not be told.

        More values than can be compared in time are not valid: else a caller could avoid the check.
        """
        if digest not in self._compiled:
            self._compiled.remember(digest, _compile(schema))
        if (compiled := self._compiled.get(digest, None)) is None:
            self.unchecked += 1
            return None
        check, weight = compiled
        try:
            return weight * _count(arguments) <= MAX_WORK and check(arguments)
        except (ArithmeticError, RecursionError):  # numbers beyond a double, where those are let in
            return False


def weigh(root: Any) -> int:
    """How many schemas there are, with those that are referred to, wherever they are.

    Raises:
        NotKnown: too many, or something whose cost can not be told.
    """
    return _weigh(root, root, 0)


def _weigh(schema: Any, root: Any, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise NotKnown
    if isinstance(schema, bool):
        return 1
    if not isinstance(schema, dict):
        raise NotKnown
    total = 1
    for keyword, value in schema.items():
        if keyword == "enum" and isinstance(value, list):
            total += len(value)
        total += sum(_weigh(each, root, depth + 1) for each in _below(keyword, value, root))
        if total > MAX_WEIGHT:
            raise NotKnown
    return total


def _below(keyword: str, value: Any, root: Any) -> Iterator[Any]:
    """The schemas that a keyword applies."""
    if keyword == "$ref":
        yield _referred(value, root)
    elif keyword in _ONE:
        yield value
    elif keyword in _SEVERAL and isinstance(value, list):
        yield from value
    elif keyword in _NAMED and isinstance(value, dict):
        yield from value.values()
    elif not (keyword in _PLAIN or keyword in _DEFINED or keyword.startswith("x-")):
        raise NotKnown


def _referred(reference: Any, root: Any) -> Any:
    """The schema of `#/$defs/NAME`; there are no other references."""
    match reference.split("/") if isinstance(reference, str) else ():
        case ["#", ("$defs" | "definitions") as place, name] if not {"~", "%"} & {*name}:
            defined = root.get(place)
            if isinstance(defined, dict) and name in defined:
                return defined[name]
    raise NotKnown


def _compile(schema: Any) -> tuple[Check, int] | None:
    try:
        if not isinstance(schema, dict) or len(json.dumps(schema)) > MAX_SCHEMA:
            return None
        weight = weigh(schema)
    except NotKnown:
        return None
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    kind: Any = Draft202012Validator
    if "$schema" in schema:
        kind = validator_for(schema, default=cast("Any", None))
    try:
        if kind is None:
            return None
        kind.check_schema(schema)
    except (SchemaError, RecursionError):
        return None
    return kind(schema, registry=Registry()).is_valid, weight


def _count(value: Any) -> int:
    """How many values there are in a value."""
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        count += 1
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return count
