"""Pins: a server's tools as somebody has seen and approved them, in a file.

The file is JSON, sorted and in ASCII, so that it can be reviewed: what a description hides in
invisible characters is seen. It holds whole definitions, so that it can be said what has changed,
and the digest of each, which is what decides.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sidecar.errors import ConfigError, MalformedMessage
from sidecar.protocol.catalog import digest, is_tool
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, parse_json

VERSION = 1
_CONTEXT = 2


@dataclass(frozen=True, slots=True)
class Pins:
    """The approved definitions by name. `server` is what the server calls itself, for people."""

    server: str
    tools: Mapping[str, JsonObject]

    @property
    def digests(self) -> dict[str, str]:
        """What a listed definition is compared with."""
        return {name: digest(tool) for name, tool in self.tools.items()}


def pin(server: str, listed: Iterable[JsonObject]) -> Pins:
    """The tools of a whole listing, pinned as they are.

    Raises:
        ConfigError: two tools have the same name: nobody can say which one is approved.
    """
    tools: dict[str, JsonObject] = {}
    for each in listed:
        if each["name"] in tools:
            raise ConfigError(f"the server lists two tools {each['name']!r}")
        tools[each["name"]] = each
    return Pins(server, tools)


def write(pins: Pins) -> str:
    """The file."""
    tools = {
        name: {"digest": digest(tool), "definition": tool} for name, tool in pins.tools.items()
    }
    return _pretty({"version": VERSION, "server": pins.server, "tools": tools}) + "\n"


def read(text: bytes) -> Pins:
    """The pins of a file.

    Raises:
        ConfigError: it is no such file, or a definition in it is not the one that its digest is of.
    """
    try:
        value = parse_json(text, FROM_SERVER)
    except MalformedMessage as error:
        raise ConfigError(f"no JSON: {error}") from error
    tools = value.get("tools") if isinstance(value, dict) else None
    if (
        not isinstance(value, dict)
        or value.get("version") != VERSION
        or not isinstance(tools, dict)
    ):
        raise ConfigError(f"no pins of version {VERSION}; `mcp-sidecar pin` makes them")
    return Pins(str(value.get("server", "")), {name: _tool(name, tools[name]) for name in tools})


def _tool(name: str, entry: object) -> JsonObject:
    tool = entry.get("definition") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(tool, dict) or not is_tool(tool):
        raise ConfigError(f"tools.{name}: needs a definition and its digest")
    if tool["name"] != name or entry.get("digest") != digest(tool):
        raise ConfigError(f"tools.{name}: the digest is not that of the definition; pin it anew")
    return tool


def differences(pinned: Pins, found: Pins) -> Iterator[str]:
    """What has changed, line by line, for people; nothing where all is as it was pinned."""
    for name in sorted({*pinned.tools, *found.tools}):
        before, after = pinned.tools.get(name), found.tools.get(name)
        if before is None:
            yield f"added: {name}"
        elif after is None:
            yield f"removed: {name}"
        elif digest(before) != digest(after):
            yield f"changed: {name} ({', '.join(_changed(before, after))})"
        else:
            continue
        yield from _lines(before, after)


def _changed(before: JsonObject, after: JsonObject) -> list[str]:
    old, new = ({key: digest(value) for key, value in each.items()} for each in (before, after))
    return [each for each in sorted({*old, *new}) if old.get(each) != new.get(each)]


def _lines(before: JsonObject | None, after: JsonObject | None) -> Iterator[str]:
    old, new = ([] if each is None else _pretty(each).splitlines() for each in (before, after))
    for line in list(difflib.unified_diff(old, new, n=_CONTEXT, lineterm=""))[2:]:
        yield f"  {line}"


def _pretty(value: JsonObject) -> str:
    return json.dumps(value, indent=2, sort_keys=True)
