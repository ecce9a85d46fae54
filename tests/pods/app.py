"""A real MCP server as pods have it: the ticket desk, told by MCP_HOST where to listen.

    python -m tests.pods.app --data FOLDER [--port 8080] [--everywhere] [--share-port]

`--everywhere` does not listen to what it is told; `--share-port` sets SO_REUSEPORT as well. In the
folder: `log` is what reached it; while `hold` exists no call ends; while `sick` exists, it is.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from tests.support.ticket_desk import Log, build


def main() -> None:
    parser = argparse.ArgumentParser(prog="app")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--everywhere", action="store_true")
    parser.add_argument("--share-port", action="store_true")
    options = parser.parse_args()
    server = build(Log(options.data / "log"), options.data / "hold")

    async def health(request: Request) -> PlainTextResponse:
        return PlainTextResponse("", 500 if (options.data / "sick").exists() else 200)

    server.custom_route("/healthz", methods=["GET"])(health)
    host = "::" if options.everywhere else os.environ.get("MCP_HOST", "::")
    both = host == "::"
    with socket.create_server(
        (host, options.port), family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both, reuse_port=options.share_port,
    ) as listener:  # fmt: skip
        print(f"listening on {host}", flush=True)
        app = server.streamable_http_app(json_response=True, host=host)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none")).run([listener])


if __name__ == "__main__":
    main()
