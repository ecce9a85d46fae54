"""What a server offers: to everybody alike, or to each whose own credentials reach it.

An `Offer` holds the four listings of one caller. A server that is sent its callers' credentials may
show each of them something else, so nobody is judged by what another one was shown.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from sidecar.protocol.catalog import (
    Catalog,
    Entry,
    Listed,
    Tool,
    is_pinned,
    read_entry,
    read_page,
    read_tool,
)
from sidecar.protocol.jsonrpc import JsonObject
from sidecar.protocol.methods import PROMPTS, RESOURCES, TEMPLATES, TOOLS, Listing
from sidecar.protocol.session import Bounded
from sidecar.protocol.templates import matches

MAX_CALLERS = 1000
"""Callers of one server whose offers are kept, those used last; others are learned again."""

MAX_TEMPLATES = 1000
"""Templates that a URI is held against; where there are more, it can't be told."""

LISTINGS = {each.kind: each for each in (TOOLS, RESOURCES, TEMPLATES, PROMPTS)}
"""What is learned, by kind."""

METHODS = {
    TOOLS.kind: "tools/list",
    RESOURCES.kind: "resources/list",
    TEMPLATES.kind: "resources/templates/list",
    PROMPTS.kind: "prompts/list",
}

FAMILIES = {
    TOOLS.kind: "tools",
    RESOURCES.kind: "resources",
    TEMPLATES.kind: "resources",
    PROMPTS.kind: "prompts",
}
"""The capability that a listing belongs to, which has one notification for its changes."""

CHANGED = {f"notifications/{each}/list_changed": each for each in FAMILIES.values()}


@dataclass(slots=True)
class Schedule:
    """When one kind is to be listed again, by the loop's clock, and the listing that goes on."""

    due: float | None = None
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Offer:
    """What one caller is offered, and when it is to be listed again."""

    tools: Catalog = field(default_factory=Catalog)
    resources: Listed[Entry] = field(default_factory=Listed)
    templates: Listed[Entry] = field(default_factory=Listed)
    prompts: Listed[Entry] = field(default_factory=Listed)
    schedules: dict[str, Schedule] = field(default_factory=lambda: defaultdict(Schedule))

    def of(self, kind: str) -> Listed[Any]:
        """The listing of that kind."""
        listings: dict[str, Listed[Any]] = {
            TOOLS.kind: self.tools,
            RESOURCES.kind: self.resources,
            TEMPLATES.kind: self.templates,
            PROMPTS.kind: self.prompts,
        }
        return listings[kind]

    def known(self, target: str, name: str) -> bool | None:
        """Whether there is such a tool, resource or prompt; None when that can't be told."""
        match target:
            case "tool":
                return self.tools.has(name)
            case "prompt":
                return self.prompts.has(name)
            case "resource":
                return self._has_resource(name)
            case _:
                return None

    def _has_resource(self, uri: str) -> bool | None:
        """By its own listing, or by a template; a server without the method has no templates."""
        listed = self.resources.has(uri)
        if listed is True or self.templates.known() > MAX_TEMPLATES:
            return listed or None
        if any(matches(each.name, uri) for each in self.templates):
            return True
        return listed if self.templates.complete or self.templates.futile else None

    def forget(self, family: str) -> None:
        """The server says that these changed."""
        for kind, of in FAMILIES.items():
            if of == family:
                self.of(kind).forget()


class Offers:
    """The offers of one server. What is alike in many of them is kept once."""

    def __init__(self) -> None:
        self.shared = Offer()
        self._callers: Bounded[Hashable, Offer] = Bounded(MAX_CALLERS)
        self._kept: WeakValueDictionary[tuple[str, str], Tool | Entry] = WeakValueDictionary()

    def to(self, caller: Hashable | None) -> Offer:
        """The offer to a caller; None is whoever brings no credentials."""
        if caller is None:
            return self.shared
        offer = self._callers.get(caller) or Offer(Catalog(pins=self.pins))
        self._callers.remember(caller, offer)
        return offer

    def forget(self, caller: Hashable | None) -> None:
        """That caller will not come again."""
        self._callers.pop(caller, None)

    def __iter__(self) -> Iterator[Offer]:
        return iter((self.shared, *self._callers.values()))

    def observe(
        self, offer: Offer, listing: Listing, cursor: str | None, result: Any
    ) -> str | None:
        """Take in the answer to a listing with `cursor`; returns the cursor of the next page."""
        items, next_cursor = read_page(result, listing)
        page = [self._read(listing, each) for each in items]
        offer.of(listing.kind).observe(cursor, page, next_cursor)
        return next_cursor

    def _read(self, listing: Listing, item: JsonObject) -> Tool | Entry:
        read = read_tool(item) if listing is TOOLS else read_entry(listing, item)
        key = read.digest if isinstance(read, Tool) else read.name
        return self._kept.setdefault((listing.kind, key), read)

    # ------------------------------------------------------------------ pins

    @property
    def pins(self) -> Mapping[str, str] | None:
        """The digests of approved tools by name; None without pins."""
        return self.shared.tools.pins

    @pins.setter
    def pins(self, pins: Mapping[str, str] | None) -> None:
        for each in self:
            each.tools.pins = pins

    # ------------------------------------------------------------------ figures

    def tools(self) -> int:
        """How many definitions of tools there are, each counted once."""
        return len(self._definitions())

    def unpinned(self) -> int:
        """How many of them are not as they were pinned."""
        if self.pins is None:
            return 0
        return sum(not is_pinned(self.pins, t.name, t.digest) for t in self._definitions())

    def _definitions(self) -> Collection[Tool]:
        """Each once. What is alike is kept once, so none of very many has to be looked at."""
        found: dict[int, Tool] = {}
        for each in self:
            found.update(zip(map(id, each.tools), each.tools, strict=True))
        return found.values()

    def complete(self) -> bool:
        """Whether all tools are known, of everybody who has an offer of his own."""
        return all(each.tools.complete for each in self._callers.values() or (self.shared,))
