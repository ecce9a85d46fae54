"""Learning what the server offers: from listings that pass, and by listing for ourselves.

A call to a tool of which nothing is known waits, a bounded time, while the sidecar asks the server
for its tools, page by page; a prompt and a resource are waited for in the same way. It asks as the
caller does, with the caller's credentials where those go to the server. It never asks before the
server knows the era of the conversation: the first request on a pipe locks it (`asked too early`
would lock the wrong one).

What is known may be out of date: a server need not say that its tools changed. So calls have the
tools listed again every `refresh` seconds, and wait for that never: what it finds is in force for
the calls after it. A client that was shown another definition meanwhile saw it in a listing that
passed, which is in force at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from sidecar.conversation import Ask, Conversation
from sidecar.errors import SidecarError, UnknownMethod
from sidecar.offers import FAMILIES, LISTINGS, METHODS, Offer
from sidecar.policy import enforcement
from sidecar.protocol.catalog import MAX_PAGES
from sidecar.protocol.jsonrpc import JsonObject, Request, Response
from sidecar.protocol.methods import PROMPTS, RESOURCES, TEMPLATES, TOOLS, Era
from sidecar.protocol.session import (
    CLIENT_CAPABILITIES_KEY,
    CLIENT_INFO_KEY,
    VERSION_KEY,
    Operation,
)

log = logging.getLogger("sidecar.learning")

_KINDS = {
    "tool": (TOOLS.kind,),
    "prompt": (PROMPTS.kind,),
    "resource": (RESOURCES.kind, TEMPLATES.kind),
}
"""The listings that tell whether there is such a target."""


def observe(conversation: Conversation, operation: Operation, response: Response) -> None:
    """Take in the answer to a listing that passes."""
    listing, cursor = operation.method.listing, operation.params.get("cursor")
    if listing is not None and listing.kind in LISTINGS and response.error is None:
        cursor = None if cursor is None else str(cursor)
        _observe(conversation, conversation.offer, listing.kind, cursor, response)


def _observe(
    conversation: Conversation, offer: Offer, kind: str, cursor: str | None, response: Response
) -> str | None:
    offers = conversation.server.offers
    return offers.observe(offer, LISTINGS[kind], cursor, response.result)


async def learn(
    conversation: Conversation, operation: Operation, ask: Ask, version: str, patience: float
) -> None:
    """Before a call to a tool that nothing is known of, list the server's tools.

    Of one that is known too, when that is due, but beside the call. It waits for at most `patience`
    seconds: what is not learned by then stays unknown, nothing is raised.
    """
    kinds = _KINDS.get(operation.method.target or "")
    if kinds is None:
        return
    offer, target = conversation.offer, operation.targets[0]
    lister = _Lister(conversation, offer, operation, ask, version)
    missing = []
    if offer.known(target.type, target.name) is None:
        missing = [each for each in kinds if _can_be_learned(conversation, offer, each)]
    if not missing:
        due = [each for each in kinds if _is_due(conversation, offer, each)]
        if due and _greeted(conversation, operation):
            lister.start(due)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            if await _may_ask(conversation, operation):
                await asyncio.wait(lister.start(missing))


def _can_be_learned(conversation: Conversation, offer: Offer, kind: str) -> bool:
    """Whether it is of use to wait for a listing: not where the server says that there is none."""
    listed = offer.of(kind)
    return not (listed.complete or listed.futile) and _declared(conversation, kind)


def _declared(conversation: Conversation, kind: str) -> bool:
    """Whether the server may have the kind; of tools also one that forgets to say so is asked."""
    capabilities = conversation.session.capabilities
    return kind == TOOLS.kind or capabilities is None or FAMILIES[kind] in capabilities


def _is_due(conversation: Conversation, offer: Offer, kind: str) -> bool:
    """Whether a kind is to be listed again; first a while after the first call."""
    now, schedule = asyncio.get_running_loop().time(), offer.schedules[kind]
    if schedule.due is None:
        schedule.due = now + conversation.server.refresh
    return now >= schedule.due and _declared(conversation, kind)


def _greeted(conversation: Conversation, operation: Operation) -> bool:
    """Whether the server can be asked at once."""
    if operation.era is Era.MODERN:
        probe = conversation.discovering
        return probe is None or (probe.done() and probe.result())
    return not _greeting(conversation) or conversation.greeted.is_set()


def _greeting(conversation: Conversation) -> bool:
    return conversation.session.protocol_version is not None and conversation.lasting


async def _may_ask(conversation: Conversation, operation: Operation) -> bool:
    if operation.era is Era.MODERN:
        probe = conversation.discovering
        return probe is None or await asyncio.shield(probe)
    if _greeting(conversation):
        await conversation.greeted.wait()
    return True


@dataclass(frozen=True, slots=True)
class _Lister:
    """Lists as the caller of an operation would; `version` is the sidecar's."""

    conversation: Conversation
    offer: Offer
    operation: Operation
    ask: Ask
    version: str

    def start(self, kinds: Iterable[str]) -> list[asyncio.Task[None]]:
        """List these kinds, those apart of which that is going on."""
        return [self._started(each) for each in kinds]

    def _started(self, kind: str) -> asyncio.Task[None]:
        schedule, loop = self.offer.schedules[kind], asyncio.get_running_loop()
        if schedule.task is None or schedule.task.done():
            schedule.due = loop.time() + self.conversation.server.refresh
            schedule.task = loop.create_task(self._list(kind))
        return schedule.task

    async def _list(self, kind: str) -> None:
        """Follow a listing to its last page. Who has no such method is not waited for again."""
        cursor: str | None = None
        for page in range(MAX_PAGES):
            request = self._request(kind, page, cursor)
            try:
                response = await self.ask(enforcement.for_catalog(request))
            except SidecarError as error:
                log.warning("the server's %s could not be listed: %s", kind, error)
                return
            if (refused := response.error) is not None:
                log.warning("the server did not list its %s: %s", kind, refused.get("message"))
                self.offer.of(kind).futile = refused["code"] == UnknownMethod.rpc_code
                return
            cursor = _observe(self.conversation, self.offer, kind, cursor, response)
            if cursor is None:
                return
        self.offer.of(kind).futile = True

    def _request(self, kind: str, page: int, cursor: str | None) -> Request:
        operation, name = self.operation, f"mcp-opa-sidecar-{os.urandom(8).hex()}-{page}"
        params = listing_params(operation.era, operation.protocol_version, self.version, cursor)
        return Request(name, METHODS[kind], params)


def listing_params(
    era: Era, revision: str | None, version: str, cursor: str | None = None
) -> JsonObject:
    """What the sidecar's own requests say in each era; `version` is the sidecar's."""
    params: JsonObject = {} if cursor is None else {"cursor": cursor}
    if era is Era.MODERN:
        params["_meta"] = {
            VERSION_KEY: revision,
            CLIENT_CAPABILITIES_KEY: {},
            CLIENT_INFO_KEY: {"name": "mcp-opa-sidecar", "version": version},
        }
    return params
