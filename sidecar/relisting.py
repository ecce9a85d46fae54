"""Clients are told when the policy lets them see something else than before (`list_changed`).

Of a listing that a client has followed to its end, a figure of the names that it was shown is kept,
and the action by which it asked. After a change of the policy that is asked about once more, with
what the catalog holds by now. Who would see something else is told, once, and lists again.

The protocol lets us tell two kinds of clients: a session whose server has declared `listChanged`,
on its open stream, and a subscription of the stateless revision that its server has acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from sidecar.conversation import Call, Conversation, Tell
from sidecar.due import Due, few_at_a_time
from sidecar.errors import DecisionError
from sidecar.judging import Judge
from sidecar.offers import FAMILIES, LISTINGS
from sidecar.protocol.catalog import read_page
from sidecar.protocol.jsonrpc import JsonObject, Notification, Response
from sidecar.protocol.methods import Era, Listing
from sidecar.protocol.session import Bounded

log = logging.getLogger("sidecar.pipeline")

MAX_SHOWN = 10_000
"""Listings of clients that are remembered, the latest ones."""

AT_ONCE = 4
"""Questions at a time."""

TO_TELL = 1.0
"""Seconds that a client has to take a notification."""

SUBSCRIPTION = "io.modelcontextprotocol/subscriptionId"

Key = tuple[Hashable, str]
"""A client, and a kind of listing."""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What a client has seen of a listing: `names` is a figure of them, `cursor` where it goes on.

    It has been seen to its end when there is no cursor.
    """

    conversation: Conversation
    call: Call
    kind: str
    names: int
    cursor: str | None

    @property
    def question(self) -> Hashable:
        """What is alike is asked about once: the sessions of one client may be very many."""
        actor, operation, conversation = self.call.actor, self.call.operation, self.conversation
        who = actor.keys, actor.token.id if actor.token else None, self.call.source_address
        what = operation.era, operation.protocol_version, operation.client, self.kind
        said = tuple(self.call.unverified.items())
        return who, what, said, conversation.server.name, conversation.caller


@dataclass(frozen=True, slots=True, eq=False)
class Subscription:
    """A stream of the stateless revision, and what its server has agreed to tell on it."""

    conversation: Conversation
    call: Call
    families: frozenset[str]

    @property
    def tell(self) -> Tell | None:
        """The way to write to it."""
        return self.call.tell or self.conversation.tell

    @property
    def params(self) -> JsonObject:
        """What says whose message it is."""
        return {"_meta": {SUBSCRIPTION: self.call.request_id}}


class Relisting:
    """Remembers what clients were shown, and tells them after each `change` if that differs."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._changed = 0
        self._shown: Bounded[Key, Shown] = Bounded(MAX_SHOWN)
        self._subscriptions: dict[Hashable, dict[Call, Subscription]] = defaultdict(dict)
        self._subscribers: dict[Call, Hashable] = {}
        self._due: Due[Key, Shown] = Due()

    # ------------------------------------------------------------------ what is remembered

    def shown(
        self, conversation: Conversation, call: Call, listing: Listing, response: Response
    ) -> None:
        """A client gets this page of a listing."""
        client = _client(conversation, call)
        if client is None or listing.kind not in LISTINGS:
            return
        key, cursor = (client, listing.kind), call.operation.params.get("cursor")
        earlier = self._shown.pop(key, None)
        items, following = read_page(response.result, listing)
        names = _figure({each[listing.item_name] for each in items})
        if cursor is not None:
            if earlier is None or earlier.cursor != cursor:
                return
            names += earlier.names
        page = Shown(conversation, call, listing.kind, names, following)
        self._shown.remember(key, page)
        if following is None and call.asked < self._changed:
            self._due.add({key: page})

    def subscribed(self, conversation: Conversation, params: JsonObject) -> None:
        """A server has acknowledged a subscription, or a part of what it asks for."""
        meta, agreed = params.get("_meta"), params.get("notifications")
        if not isinstance(meta, dict) or not isinstance(agreed, dict):
            return
        families = {each for each in FAMILIES.values() if agreed.get(f"{each}ListChanged") is True}
        for call in conversation.calls:
            asked = {each.name for each in call.operation.targets if each.kind == "listing"}
            if call.request_id == meta.get(SUBSCRIPTION):
                both = frozenset(each for each in families if f"{each}ListChanged" in asked)
                client = self._subscribers[call] = _client(conversation, call)
                self._subscriptions[client][call] = Subscription(conversation, call, both)

    def release(self, call: Call) -> None:
        """A call is over; it may have been a subscription."""
        if call not in self._subscribers:
            return
        client = self._subscribers.pop(call)
        del self._subscriptions[client][call]
        if not self._subscriptions[client]:
            del self._subscriptions[client]

    def forget(self, conversation: Conversation) -> None:
        """A conversation is over."""
        for kind in LISTINGS:
            self._shown.pop((conversation, kind), None)

    # ------------------------------------------------------------------ asking again

    def change(self) -> None:
        """The policy or its data is not what it was."""
        self._changed = time.time_ns()
        self._due.add({key: each for key, each in self._shown.items() if each.cursor is None})

    async def step(self) -> None:
        """Wait until something is due, and ask about it; to be done for as long as we live."""
        await self._due.wait()
        await self.sweep()

    async def sweep(self) -> None:
        """Ask once about all that is due; what got no decision stays due."""
        due = self._due.take()
        alike: dict[Hashable, dict[Key, Shown]] = defaultdict(dict)
        for key, shown in due.items():
            if any(self._listeners(key)):
                alike[shown.question][key] = shown
        await few_at_a_time(alike.values(), AT_ONCE, self._try)

    async def _try(self, group: dict[Key, Shown]) -> None:
        try:
            await self._ask(group)
        except DecisionError:
            self._due.put_back(group)
        except Exception:
            log.exception("what clients were shown could not be asked about")

    async def _ask(self, group: dict[Key, Shown]) -> None:
        """Ask about the first of those that are alike, and tell all for whom it is another."""
        names = await self._visible(next(iter(group.values())))
        for key, shown in group.items():
            if names is not None and names != shown.names:
                await self._tell(key, shown)

    async def _visible(self, shown: Shown) -> int | None:
        """The figure of what would be shown now; None when nobody knows all that there is."""
        listed = shown.conversation.offer.of(shown.kind)
        if not listed.complete:
            return None
        call = replace(shown.call, decision=None, error=None, asked=0, answered=0)
        listing = LISTINGS[shown.kind]
        return _figure(await self._judge.visible(shown.conversation, call, listing, tuple(listed)))

    # ------------------------------------------------------------------ telling

    async def _tell(self, key: Key, shown: Shown) -> None:
        """Tell it on every stream of the client's; it is not told again before it has listed."""
        if self._shown.get(key) is shown:
            del self._shown[key]
        method = f"notifications/{FAMILIES[shown.kind]}/list_changed"
        for tell, params in list(self._listeners(key)):
            log.info("telling a client that the policy changed what it sees of the %s", shown.kind)
            try:
                async with asyncio.timeout(TO_TELL):
                    await tell(Notification(method, params))
            except Exception as error:
                log.warning("a client could not be told: %s", error)

    def _listeners(self, key: Key) -> Iterator[tuple[Tell, JsonObject | None]]:
        """The ways there are to tell a client of changes of that kind."""
        client, family = key[0], FAMILIES[key[1]]
        if isinstance(client, Conversation) and _declares(client, family) and client.tell:
            yield client.tell, None
        for each in self._subscriptions.get(client, {}).values():
            if family in each.families and each.tell is not None:
                yield each.tell, each.params


def _client(conversation: Conversation, call: Call) -> Hashable | None:
    """Who sees a listing: a conversation, or all that one actor does without any."""
    if conversation.lasting:
        return conversation
    if call.operation.era is Era.LEGACY:
        return None
    return conversation.server.name, call.actor.keys, conversation.caller


def _declares(conversation: Conversation, family: str) -> bool:
    """Whether the server of a session has said that it tells of changes."""
    declared = (conversation.session.capabilities or {}).get(family)
    return isinstance(declared, dict) and declared.get("listChanged") is True


def _figure(names: Iterable[str]) -> int:
    """A figure of a set of names; those of several pages add up."""
    return sum(map(hash, names))
