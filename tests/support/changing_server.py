"""A stdio server whose tools are those of a file, as it is whenever they are listed, and a witness.

It never says that they changed, and a page holds two of them. Every call is a line in the log.

    python -m tests.support.changing_server --tools FILE --log FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Object = dict[str, Any]
PAGE = 2
REVISION = "2026-07-28"
CACHED = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
ID: Object = {"type": "object", "properties": {"id": {"type": "integer"}}}


class Tools:
    """The file: what the next listing says."""

    def __init__(self, folder: Path) -> None:
        self.file, self.log = folder / "tools.json", folder / "log"
        self.set(get=tool("get_ticket"), search=tool("search_tickets"), make=tool("create_ticket"))

    def set(self, **tools: Object) -> None:
        """Make the server offer these."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(list(tools.values())), encoding="utf-8")
        new.replace(self.file)

    def change(self, **fields: Any) -> None:
        """Make the server offer another `get_ticket`."""
        first, *others = json.loads(self.file.read_text(encoding="utf-8"))
        self.set(**{each["name"]: each for each in ({**first, **fields}, *others)})

    def command(self) -> list[str]:
        """The server's command line."""
        module = (sys.executable, "-m", "tests.support.changing_server")
        return [*module, "--tools", str(self.file), "--log", str(self.log)]

    def called(self) -> list[str]:
        """The tools that the server ran."""
        return self.log.read_text(encoding="utf-8").split() if self.log.exists() else []


def tool(name: str, **fields: Any) -> Object:
    return {"name": name, "description": "Does it.", "inputSchema": ID, **fields}


def answer(message: Object, tools: list[Object], log: Path) -> Object:
    """The result of a request."""
    params = message.get("params", {})
    info = {"name": "changing", "version": "1"}
    match message["method"]:
        case "initialize":
            version = params["protocolVersion"]
            return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        case "server/discover":
            meta = {"io.modelcontextprotocol/serverInfo": info}
            return {"supportedVersions": [REVISION], "capabilities": {"tools": {}}, "_meta": meta}
        case "tools/list":
            start = int(params.get("cursor", "0"))
            more = {"nextCursor": str(start + PAGE)} if start + PAGE < len(tools) else {}
            return {"tools": tools[start : start + PAGE], **more}
        case _:
            with log.open("a", encoding="utf-8") as file:
                file.write(params["name"] + "\n")
            return {"content": [{"type": "text", "text": "done"}]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="changing_server")
    parser.add_argument("--tools", type=Path, required=True, metavar="FILE")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        tools = json.loads(options.tools.read_text(encoding="utf-8"))
        result = answer(message, tools, options.log)
        if "_meta" in message.get("params", {}):
            result = {**CACHED, **result}
        reply = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
