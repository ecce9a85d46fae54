"""A server that offers what a file says, to each token something else, and a witness. Both eras.

The file holds what there is by the caller's token, and for `-` what whoever has none is offered:
the names of tools with their descriptions, prompts, URIs and templates of URIs. Each request is a
line in the log: the token, the method, and the name. With `--announces` it declares `listChanged`,
and serves `subscriptions/listen`, but it never says itself that anything has changed.

    python -m tests.support.offering_server --offers FILE --log FILE [--transport stdio|http|sse]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcp import types
from mcp.server import MCPServer, NotificationOptions, Server
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler

from tests.support.ticket_desk import serve

NOBODY = "-"
SCHEMA = {"type": "object"}

Context = Any  # the SDK's own, of whichever transport


class Offers:
    """The file and the log, for tests."""

    def __init__(self, folder: Path) -> None:
        self.file, self.log = folder / "offers.json", folder / "requests"

    def set(self, **offers: Mapping[str, Any]) -> None:
        """What is offered from now on, by token; `nobody` is who has none."""
        said = {each.replace("nobody", NOBODY): offer for each, offer in offers.items()}
        self.file.write_text(json.dumps(said), encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        """The server's command line."""
        module = (sys.executable, "-m", "tests.support.offering_server")
        return [*module, "--offers", str(self.file), "--log", str(self.log), *arguments]

    def asked(self, method: str) -> list[str]:
        """The tokens that a method was asked with."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [each.split()[0] for each in lines if each.split()[1] == method]


class Offering:
    """The handlers."""

    def __init__(self, file: Path, log: Path) -> None:
        self._file = file
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _take(self, context: Context, method: str, name: str = "-") -> Mapping[str, Any]:
        headers = {} if context.request is None else context.request.headers
        token = headers.get("authorization", f"Bearer {NOBODY}").removeprefix("Bearer ")
        os.write(self._log, f"{token} {method} {name}\n".encode())
        offer: Mapping[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))[token]
        return offer

    async def tools(self, context: Context, _: object) -> types.ListToolsResult:
        offer = self._take(context, "tools/list").get("tools", {})
        return types.ListToolsResult(
            tools=[
                types.Tool(name=name, description=said, input_schema=SCHEMA)
                for name, said in offer.items()
            ]
        )

    async def call(
        self, context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        self._take(context, "tools/call", params.name)
        return types.CallToolResult(content=[types.TextContent(text="done")])

    async def resources(self, context: Context, _: object) -> types.ListResourcesResult:
        offer = self._take(context, "resources/list").get("resources", [])
        return types.ListResourcesResult(
            resources=[types.Resource(uri=each, name=each) for each in offer]
        )

    async def templates(self, context: Context, _: object) -> types.ListResourceTemplatesResult:
        offer = self._take(context, "resources/templates/list").get("templates", [])
        found = [types.ResourceTemplate(uri_template=each, name=each) for each in offer]
        return types.ListResourceTemplatesResult(resource_templates=found)

    async def read(
        self, context: Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        self._take(context, "resources/read", str(params.uri))
        content = types.TextResourceContents(uri=params.uri, text="done")
        return types.ReadResourceResult(contents=[content])

    async def prompts(self, context: Context, _: object) -> types.ListPromptsResult:
        offer = self._take(context, "prompts/list").get("prompts", [])
        return types.ListPromptsResult(prompts=[types.Prompt(name=each) for each in offer])

    async def prompt(
        self, context: Context, params: types.GetPromptRequestParams
    ) -> types.GetPromptResult:
        self._take(context, "prompts/get", params.name)
        return types.GetPromptResult(messages=[])


class Quiet(Server[Any]):
    """Declares that it tells of changes, if it is said to."""

    announces = False

    def create_initialization_options(self, *said: Any, **more: Any) -> Any:
        told = NotificationOptions(self.announces, self.announces, self.announces)
        return super().create_initialization_options(told)


def build(file: Path, log: Path, *, announces: bool, without: Sequence[str] = ()) -> Quiet:
    """The server; `without` are the kinds that it has no methods for."""
    offering = Offering(file, log)
    handlers: dict[str, dict[str, Any]] = {
        "tools": {"on_list_tools": offering.tools},
        "resources": {"on_list_resources": offering.resources},
        "templates": {"on_list_resource_templates": offering.templates},
        "prompts": {"on_list_prompts": offering.prompts},
    }
    listing = {
        name: each
        for kind, of in handlers.items()
        if kind not in without
        for name, each in of.items()
    }
    if announces:
        listing["on_subscriptions_listen"] = ListenHandler(InMemorySubscriptionBus())
    server = Quiet(
        "offering",
        version="1",
        on_call_tool=offering.call,
        on_read_resource=offering.read,
        on_get_prompt=offering.prompt,
        **listing,
    )
    server.announces = announces
    return server


def main() -> None:
    parser = argparse.ArgumentParser(prog="offering_server")
    parser.add_argument("--offers", type=Path, required=True, metavar="FILE")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    parser.add_argument("--transport", choices=["stdio", "http", "sse"], default="stdio")
    parser.add_argument("--announces", action="store_true")
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    server = build(
        options.offers, options.log, announces=options.announces, without=options.without
    )
    if options.transport == "http":
        serve(server.streamable_http_app(), 0, "/mcp")
        return
    shell = MCPServer[Any]("offering", log_level="WARNING")
    shell._lowlevel_server = server
    if options.transport == "sse":
        serve(shell.sse_app(), 0, "/sse")
    else:
        shell.run("stdio")


if __name__ == "__main__":
    main()
