"""A stdio server that says what its caller tells it to, message by message, and a witness.

The arguments of the tool `say` are a script: `before` are messages to write, in which the texts
`$id` and `$token` stand for what the request came with; `then` is `answer`, `wait` (for an answer
to a question of ours, whose result is the text of the answer), `nothing` or `die`. Every message
that comes in is a line of JSON in the log.

    python -m tests.support.puppet_server --log FILE
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

Object = dict[str, Any]


def command(log: Path) -> list[str]:
    """Its command line."""
    return [sys.executable, "-m", "tests.support.puppet_server", "--log", str(log)]


def heard(log: Path, method: str | None = None) -> list[Object]:
    """The messages that came in, of one method or of every one; each has the `pid` of its reader.

    An answer has the method None.
    """
    if not log.exists():
        return []
    whole, _, _ = log.read_text(encoding="utf-8").rpartition("\n")  # not a line half written
    found = [json.loads(line) for line in whole.splitlines()]
    return [each for each in found if method is None or each.get("method") == method]


def write(message: Object) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def filled(value: Any, places: Object) -> Any:
    """The value with what stands in its places."""
    if isinstance(value, dict):
        return {key: filled(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, places) for each in value]
    return places.get(value, value) if isinstance(value, str) else value


class Puppet:
    def __init__(self, log: Path) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._waiting: list[Object] = []

    def run(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            os.write(self._log, (json.dumps({**message, "pid": os.getpid()}) + "\n").encode())
            if "method" not in message:
                self._answer(self._waiting.pop(), json.dumps(message.get("result")))
            elif "id" in message:
                self._act(message)

    def _act(self, message: Object) -> None:
        params = message.get("params", {})
        if message["method"] == "initialize":
            version = params["protocolVersion"]
            server = {"name": "puppet", "version": "1"}
            if version == "refused":
                error = {"code": -32602, "message": "no such revision"}
                return write({"id": message["id"], "error": error})
            result = {"protocolVersion": version, "capabilities": {}, "serverInfo": server}
            return write({"id": message["id"], "result": result})
        if message["method"] == "tools/list":
            tools = [{"name": "say", "inputSchema": {"type": "object"}}]
            return write({"id": message["id"], "result": {"tools": tools}})
        return self._play(message, params.get("arguments") or {})

    def _play(self, message: Object, script: Object) -> None:
        token = message.get("params", {}).get("_meta", {}).get("progressToken")
        for each in script.get("before", ()):
            write(filled(each, {"$id": message["id"], "$token": token}))
        match script.get("then", "answer"):
            case "answer":
                self._answer(message, f"{message['method']} {os.getpid()}")
            case "wait":
                self._waiting.append(message)
            case "die":
                os._exit(3)
            case _:
                pass

    def _answer(self, request: Object, text: str) -> None:
        result = {"content": [{"type": "text", "text": text}], "resultType": "complete"}
        write({"id": request["id"], "result": result})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="puppet_server")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE")
    Puppet(parser.parse_args().log).run()
