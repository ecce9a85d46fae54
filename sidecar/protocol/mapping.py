"""What a call acts on: the resource that a tool's arguments name, such as `ticket:4711`.

A template has text and places, `ticket:{id}` or `desk/{desk.id}/{id}`, where a place is a dotted
path through the arguments. Values are percent-encoded but for letters, digits and `-._~`, so that
no argument can end its place and forge another resource. Where one is missing, empty or no scalar,
there is no resource: a policy denies what it must know and is not told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

_NAME = r"[^{}.\s]+"
_PLACE = rf"\{{({_NAME}(?:\.{_NAME})*)\}}"
TEMPLATE = rf"(?:[^{{}}\s]|\{{{_NAME}(?:\.{_NAME})*\}})+"
"""What a template looks like, as a whole."""

_KIND = re.compile(r"[A-Za-z0-9._-]+")
_ARGUMENT = re.compile(r"\$params\.arguments\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", re.ASCII)


def fill(template: str, arguments: Any) -> str | None:
    """The resource, None where the arguments do not say it."""
    values = [_text(_at(arguments, path)) for path in re.findall(_PLACE, template)]
    if None in values:
        return None
    found = iter(values)
    return re.sub(_PLACE, lambda _: str(next(found)), template)


def read_mapping(schema: Any) -> str | None:
    """The template that a tool's input schema declares (`x-authzen-mapping`), None without one.

    Of the AuthZEN binding for MCP this takes the plain form, a resource whose type is a text and
    whose id is one argument. Other expressions are not evaluated: no code of a server runs here.
    """
    resource = _at(schema, "x-authzen-mapping.evaluation.resource")
    kind, identity = _at(resource, "type"), _at(resource, "id")
    if not isinstance(kind, str) or not isinstance(identity, str) or not _KIND.fullmatch(kind):
        return None
    argument = _ARGUMENT.fullmatch(identity)
    return f"{kind}:{{{argument[1]}}}" if argument else None


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str | None:
    """A scalar as it stands in a resource: the same for 4711, 4711.0 and "4711"."""
    match value:
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return str(int(value))
        case int() | float():
            return quote(str(value), safe="")
        case str() if value:
            return quote(value, safe="", errors="surrogatepass")
        case _:
            return None
