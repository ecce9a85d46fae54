"""Learning what the server offers: from listings that pass, and by listing for ourselves.

A call to a tool of which nothing is known waits, a bounded time, while the sidecar asks the server
for its tools, page by page. It never asks before the server knows the era of the conversation: the
first request on a pipe locks it (`asked too early` would lock the wrong one).
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress

from sidecar.conversation import Ask, Conversation
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

    For at most `patience` seconds: what is not learned by then stays unknown, nothing is raised.
    """
    server = conversation.server
    if operation.method.target != "tool":
        return
    if server.catalog.look_up(operation.targets[0].name).known is not None:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            if not await _may_ask(conversation, operation):
                return
            if server.learning is None or server.learning.done():
                listing = _list_tools(server.catalog, operation, ask, version)
                server.learning = asyncio.get_running_loop().create_task(listing)
            await asyncio.wait((server.learning,))


async def _may_ask(conversation: Conversation, operation: Operation) -> bool:
    if operation.era is Era.MODERN:
        probe = conversation.discovering
        return probe is None or await asyncio.shield(probe)
    if conversation.session.protocol_version is not None and conversation.lasting:
        await conversation.greeted.wait()
    return True


async def _list_tools(catalog: Catalog, operation: Operation, ask: Ask, version: str) -> None:
    cursor: str | None = None
    for page in range(MAX_PAGES):
        params = _params(operation, version, cursor)
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


def _params(operation: Operation, version: str, cursor: str | None) -> JsonObject:
    params: JsonObject = {} if cursor is None else {"cursor": cursor}
    if operation.era is Era.MODERN:
        params["_meta"] = {
            VERSION_KEY: operation.protocol_version,
            CLIENT_CAPABILITIES_KEY: {},
            CLIENT_INFO_KEY: {"name": "mcp-opa-sidecar", "version": version},
        }
    return params
