"""Learning what the server offers: from listings that pass, and by listing for ourselves.

A call to a tool of which nothing is known waits, a bounded time, while the sidecar asks the server
for its tools, page by page. It never asks before the server knows the era of the conversation: the
first request on a pipe locks it (`asked too early` would lock the wrong one).

What is known may be out of date: a server need not say that its tools changed. So calls have the
tools listed again every `refresh` seconds, and wait for that never: what it finds is in force for
the calls after it. A client that was shown another definition meanwhile saw it in a listing that
passed, which is in force at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress

from sidecar.conversation import Ask, Conversation, Server
from sidecar.errors import SidecarError
from sidecar.policy import enforcement
from sidecar.protocol.catalog import MAX_PAGES, Catalog, read_page, read_tool
from sidecar.protocol.jsonrpc import JsonObject, Request, Response
from sidecar.protocol.methods import Era
from sidecar.protocol.session import (
    CLIENT_CAPABILITIES_KEY,
    CLIENT_INFO_KEY,
    VERSION_KEY,
    Operation,
)

log = logging.getLogger("sidecar.learning")


def observe(catalog: Catalog, params: JsonObject, response: Response) -> str | None:
    """Take in the answer to a `tools/list` with `params`; returns the cursor of the next page."""
    items, next_cursor = read_page(response.result)
    cursor = params.get("cursor")
    catalog.observe(None if cursor is None else str(cursor), map(read_tool, items), next_cursor)
    return next_cursor


async def learn(
    conversation: Conversation, operation: Operation, ask: Ask, version: str, patience: float
) -> None:
    """Before a call to a tool that nothing is known of, list the server's tools.

    Of one that is known too, when that is due, but beside the call. It waits for at most `patience`
    seconds: what is not learned by then stays unknown, nothing is raised.
    """
    server = conversation.server
    if operation.method.target != "tool":
        return
    if server.catalog.look_up(operation.targets[0].name).known is not None:
        if _due(server) and _greeted(conversation, operation):
            _start(server, operation, ask, version)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            if await _may_ask(conversation, operation):
                await asyncio.wait((_start(server, operation, ask, version),))


def _due(server: Server) -> bool:
    """Whether the tools are to be listed again; first a while after the first call."""
    now = asyncio.get_running_loop().time()
    if server.due is None:
        server.due = now + server.refresh
    return now >= server.due


def _start(server: Server, operation: Operation, ask: Ask, version: str) -> asyncio.Task[None]:
    """List the tools, unless that is going on."""
    if server.learning is None or server.learning.done():
        loop = asyncio.get_running_loop()
        server.due = loop.time() + server.refresh
        server.learning = loop.create_task(_list_tools(server.catalog, operation, ask, version))
    return server.learning


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


async def _list_tools(catalog: Catalog, operation: Operation, ask: Ask, version: str) -> None:
    cursor: str | None = None
    for page in range(MAX_PAGES):
        params = listing_params(operation.era, operation.protocol_version, version, cursor)
        request = Request(f"mcp-opa-sidecar-{os.urandom(8).hex()}-{page}", "tools/list", params)
        try:
            response = await ask(enforcement.for_catalog(request))
        except SidecarError as error:
            log.warning("the server's tools could not be listed: %s", error)
            return
        if response.error is not None:
            log.warning("the server did not list its tools: %s", response.error.get("message"))
            return
        cursor = observe(catalog, params, response)
        if cursor is None:
            return


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
