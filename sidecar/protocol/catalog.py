"""What the server offers, learned from its listings.

A name that the server never listed is unknown, and so is one that it listed twice (two tools under
one name: nobody can say which one a call means). The catalog is complete once a listing has been
followed from no cursor to its last page; before that, a name already seen is known and nothing can
be said of any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sidecar.errors import MalformedMessage
from sidecar.protocol.jsonrpc import JsonObject
from sidecar.protocol.mirror import Mirror, read_mirrors
from sidecar.protocol.session import Bounded

MAX_CHAINS = 64
MAX_PAGES = 1000


@dataclass(frozen=True, slots=True)
class Tool:
    """What is remembered of a listed tool. `digest` covers the whole definition.

    `mirrors` are the arguments that a request over HTTP repeats in headers.
    """

    name: str
    annotations: Mapping[str, Any]
    digest: str
    mirrors: tuple[Mirror, ...] = ()


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the catalog can say of a name: `known` is None when it can't tell."""

    known: bool | None
    tool: Tool | None = None


@dataclass(slots=True)
class Catalog:
    """The tools of one server, page by page."""

    complete: bool = False
    _tools: dict[str, Tool] = field(default_factory=dict)
    _twice: set[str] = field(default_factory=set)
    _chains: Bounded[str, tuple[Tool, ...]] = field(default_factory=lambda: Bounded(MAX_CHAINS))

    def look_up(self, name: str) -> Lookup:
        """What is known of that name."""
        if name in self._twice:
            return Lookup(False)
        tool = self._tools.get(name)
        if tool is not None:
            return Lookup(True, tool)
        return Lookup(False if self.complete else None)

    def observe(self, cursor: str | None, tools: Iterable[Tool], next_cursor: str | None) -> None:
        """Take in one page of a listing: the answer to a request with `cursor`."""
        earlier = () if cursor is None else self._chains.pop(cursor, None)
        page = tuple(tools)
        if earlier is None:
            self._see(page)
        elif next_cursor is None:
            self._replace((*earlier, *page))
        else:
            self._chains.remember(next_cursor, (*earlier, *page))
            self._see((*earlier, *page))

    def forget(self) -> None:
        """The server says that its tools changed: nothing is known until they are listed again."""
        self._tools, self._twice, self.complete = {}, set(), False
        self._chains.clear()

    def _see(self, tools: tuple[Tool, ...]) -> None:
        if not self.complete:
            self._tools.update({each.name: each for each in tools})
            self._twice |= _repeated(tools)

    def _replace(self, tools: tuple[Tool, ...]) -> None:
        self._tools = {each.name: each for each in tools}
        self._twice = _repeated(tools)
        self.complete = True


def read_page(result: Any) -> tuple[list[JsonObject], str | None]:
    """The tools of one page of `tools/list`, and the cursor of the next."""
    if not isinstance(result, dict):
        return [], None
    items, cursor = result.get("tools"), result.get("nextCursor")
    tools = [each for each in items if is_tool(each)] if isinstance(items, list) else []
    return tools, cursor if isinstance(cursor, str) else None


def is_tool(item: Any) -> bool:
    """Whether a listed item has a name that can be called."""
    return isinstance(item, dict) and isinstance(item.get("name"), str)


def read_tool(item: JsonObject) -> Tool:
    """What is remembered of a listed tool."""
    annotations = item.get("annotations")
    return Tool(
        name=item["name"],
        annotations=annotations if isinstance(annotations, dict) else {},
        digest=digest(item),
        mirrors=_mirrors(item),
    )


def is_well_annotated(item: JsonObject) -> bool:
    """Whether every argument that a header shall repeat may have one (`x-mcp-header`)."""
    with suppress(MalformedMessage):
        read_mirrors(item.get("inputSchema"))
        return True
    return False


def _mirrors(item: JsonObject) -> tuple[Mirror, ...]:
    try:
        return read_mirrors(item.get("inputSchema"))
    except MalformedMessage:
        return ()


def digest(value: Any) -> str:
    """A digest that is the same for the same JSON value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _repeated(tools: Iterable[Tool]) -> set[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for each in tools:
        (twice if each.name in seen else seen).add(each.name)
    return twice
