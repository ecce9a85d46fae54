"""What the server offers, learned from its listings: tools, resources, templates and prompts.

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
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from sidecar.errors import MalformedMessage
from sidecar.protocol.jsonrpc import JsonObject
from sidecar.protocol.mapping import read_mapping
from sidecar.protocol.methods import TOOLS, Listing
from sidecar.protocol.mirror import Mirror, read_mirrors
from sidecar.protocol.session import Bounded

MAX_CHAINS = 64
MAX_PAGES = 1000
MAX_ITEMS = 10_000
"""Items of one kind that are remembered; of a server that lists more, the others stay unknown."""


class Named(Protocol):
    """What can be listed."""

    @property
    def name(self) -> str:
        """What it is asked for by."""


Item = TypeVar("Item", bound=Named)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Entry:
    """What is remembered of a listed resource, template or prompt."""

    name: str


@dataclass(frozen=True, slots=True, weakref_slot=True)
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
class Listed(Generic[Item]):
    """What a server lists of one kind, page by page.

    `futile` is that asking for it leads nowhere: there is no such method, or no end.
    """

    complete: bool = False
    futile: bool = False
    _items: dict[str, Item] = field(default_factory=dict)
    _twice: set[str] = field(default_factory=set)
    _chains: Bounded[str, tuple[Item, ...]] = field(default_factory=lambda: Bounded(MAX_CHAINS))

    def has(self, name: str) -> bool | None:
        """Whether there is one of that name; None when that can't be told."""
        if name in self._twice:
            return False
        return True if name in self._items else False if self.complete else None

    def get(self, name: str) -> Item | None:
        """The only one of that name."""
        return None if name in self._twice else self._items.get(name)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def known(self) -> int:
        """How many there are definitions of."""
        return len(self._items)

    def observe(self, cursor: str | None, items: Iterable[Item], next_cursor: str | None) -> None:
        """Take in one page of a listing: the answer to a request with `cursor`."""
        earlier = () if cursor is None else self._chains.pop(cursor, None)
        page = tuple(items)
        if earlier is None:
            self._see(page)
        elif len(earlier) + len(page) > MAX_ITEMS:
            self._see(page)
            self.futile = True
        elif next_cursor is None:
            self._replace(earlier, page)
        else:
            self._chains.remember(next_cursor, (*earlier, *page))
            self._see(page)
            self._twice |= _repeated((*earlier, *page))

    def forget(self) -> None:
        """The server says that these changed: nothing is known until they are listed again."""
        self._items, self._twice, self.complete, self.futile = {}, set(), False, False
        self._chains.clear()

    def _see(self, page: tuple[Item, ...]) -> None:
        """Take in definitions; a name that is new to a complete catalog waits for its last page."""
        for each in page:
            room = not self.complete and len(self._items) < MAX_ITEMS
            if room or each.name in self._items:
                self._items[each.name] = each
        self._twice |= _repeated(each for each in page if each.name in self._items)

    def _replace(self, earlier: tuple[Item, ...], page: tuple[Item, ...]) -> None:
        """Only what is listed is there; what was seen since the earlier pages is newer."""
        listed = {each.name: self._items.get(each.name, each) for each in earlier}
        self._items = {**listed, **{each.name: each for each in page}}
        self._twice = _repeated((*earlier, *page))
        self.complete, self.futile = True, False


@dataclass(slots=True)
class Catalog(Listed[Tool]):
    """The tools of one server. `pins` are digests by name, None without pins."""

    pins: Mapping[str, str] | None = None

    def look_up(self, name: str) -> Lookup:
        """What is known of that name."""
        tool = self.get(name)
        if tool is None:
            return Lookup(self.has(name))
        return Lookup(True, tool, is_pinned(self.pins, name, tool.digest))

    def unpinned(self) -> int:
        """How many tools are not as they were pinned."""
        found = (is_pinned(self.pins, each.name, each.digest) for each in self)
        return sum(pinned is False for pinned in found)


def read_page(result: Any, listing: Listing = TOOLS) -> tuple[list[JsonObject], str | None]:
    """The items of one page that have a name to be asked for by, and the cursor of the next."""
    if not isinstance(result, dict):
        return [], None
    items, cursor = result.get(listing.items), result.get("nextCursor")
    found = [each for each in items if isinstance(each, dict)] if isinstance(items, list) else []
    named = [each for each in found if isinstance(each.get(listing.item_name), str)]
    return named, cursor if isinstance(cursor, str) else None


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


def read_entry(listing: Listing, item: JsonObject) -> Entry:
    """What is remembered of a listed item of another kind."""
    return Entry(sys.intern(item[listing.item_name]))


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


def _repeated(items: Iterable[Named]) -> set[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for each in items:
        (twice if each.name in seen else seen).add(each.name)
    return twice
