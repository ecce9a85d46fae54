"""An agent as pods have it: the official client, told by a variable where its server is.

    python -m tests.pods.agent VARIABLE TOOL ARGUMENTS

Prints 0, or the code of the error, and whatever came with it, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from mcp import MCPError

from tests.support.client import LEGACY, over_http


async def call(url: str, name: str, arguments: str) -> tuple[int, object]:
    try:
        async with over_http(url, LEGACY) as client:
            await client.list_tools()
            await client.call_tool(name, json.loads(arguments))
            return 0, None
    except MCPError as error:
        return error.code, error.data


if __name__ == "__main__":
    print(json.dumps(asyncio.run(call(os.environ[sys.argv[1]], *sys.argv[2:]))))
