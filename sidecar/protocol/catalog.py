"""What the server offers, learned from its listings.

A name that the server never listed is unknown, and so is one that it listed twice (two tools under
one name: nobody can say which one a call means). The catalog is complete once a listing has been
followed from no cursor to its last page; before that, a name already seen is known and nothing can
be said of any other.

A definition is in force as soon as a page with it has passed, before the client has read the page:
whoever was shown a changed tool can not call it as the one it was. Beside pins (digests of the
definitions that somebody has approved) a tool is pinned when the definition in force is that one.
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
from sidecar.protocol.mapping import read_mapping
from sidecar.protocol.mirror import Mirror, read_mirrors
from sidecar.protocol.session import Bounded

MAX_CHAINS = 64
MAX_PAGES = 1000


@dataclass(frozen=True, slots=True)
class Tool:
    """What is remembered of a listed tool. `digest` covers the whole definition.

    `mirrors` are the arguments that a request over HTTP repeats in headers, `mapping` is the
    template of the resource that a call acts on, where the server declares one. `schema` is that
    of the arguments, as listed.
    """

    name: str
    annotations: Mapping[str, Any]
    digest: str
    mirrors: tuple[Mirror, ...] = ()
    mapping: str | None = None
    schema: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the catalog can say of a name: `known` is None when it can't tell.

    `pinned` is None without pins, and where there is no definition to compare.
    """

    known: bool | None
    tool: Tool | None = None
    pinned: bool | None = None


@dataclass(slots=True)
class Catalog:
    """The tools of one server, page by page. `pins` are digests by name, None without pins."""

    complete: bool = False
    pins: Mapping[str, str] | None = None
    _tools: dict[str, Tool] = field(default_factory=dict)
    _twice: set[str] = field(default_factory=set)
    _chains: Bounded[str, tuple[Tool, ...]] = field(default_factory=lambda: Bounded(MAX_CHAINS))

    def look_up(self, name: str) -> Lookup:
        """What is known of that name."""
        if name in self._twice:
            return Lookup(False)
        tool = self._tools.get(name)
        if tool is not None:
            return Lookup(True, tool, is_pinned(self.pins, name, tool.digest))
        return Lookup(False if self.complete else None)

    def observe(self, cursor: str | None, tools: Iterable[Tool], next_cursor: str | None) -> None:
        """Take in one page of a listing: the answer to a request with `cursor`."""
        earlier = () if cursor is None else self._chains.pop(cursor, None)
        page = tuple(tools)
        if earlier is None:
            self._see(page)
        elif next_cursor is None:
            self._replace(earlier, page)
        else:
            self._chains.remember(next_cursor, (*earlier, *page))
            self._see(page)
            self._twice |= _repeated((*earlier, *page))

    def unpinned(self) -> int:
        """How many tools are not as they were pinned."""
        found = (is_pinned(self.pins, each.name, each.digest) for each in self._tools.values())
        return sum(pinned is False for pinned in found)

    def forget(self) -> None:
        """The server says that its tools changed: nothing is known until they are listed again."""
        self._tools, self._twice, self.complete = {}, set(), False
        self._chains.clear()

    def _see(self, page: tuple[Tool, ...]) -> None:
        """Take in definitions; a name that is new to a complete catalog waits for its last page."""
        self._tools.update(
            {each.name: each for each in page if not self.complete or each.name in self._tools}
        )
        self._twice |= _repeated(page)

    def _replace(self, earlier: tuple[Tool, ...], page: tuple[Tool, ...]) -> None:
        """Only what is listed is there; what was seen since the earlier pages is newer."""
        listed = {each.name: self._tools.get(each.name, each) for each in earlier}
        self._tools = {**listed, **{each.name: each for each in page}}
        self._twice = _repeated((*earlier, *page))
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
        mapping=read_mapping(item.get("inputSchema")),
        schema=item.get("inputSchema"),
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


def is_pinned(pins: Mapping[str, str] | None, name: str, definition: str) -> bool | None:
    """Whether a definition, by its digest, is the pinned one; a new tool is not. None: no pins."""
    return None if pins is None else pins.get(name) == definition


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
