"""Mode `stdio`: the server speaks on its stdin and stdout alone, and the sidecar serves it on HTTP.

The server's container runs a shim, which starts the server's command anew for each connection to a
socket. The folder of that socket is mounted by it and by the sidecar, and only the sidecar's user
is served: there is no port, and nothing on loopback, that others in the pod could dial.

What the image says of its command is not known here, so that it has to be said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sidecar import shim
from sidecar.errors import InjectionRefused, MalformedMessage
from sidecar.injector import probes
from sidecar.injector.injection import PREFIX, Injection, Json
from sidecar.injector.mode import Mode, Program
from sidecar.injector.parts import common, no_token, restricted
from sidecar.injector.walls import VOLUMES, everybody
from sidecar.injector.wishes import Wish, candidates, declared, usable
from sidecar.protocol.jsonrpc import parse_json

TOOLS, TOOLS_FOLDER = VOLUMES + "shim", "/mcp-shim"
STDIO, STDIO_FOLDER = VOLUMES + "stdio", "/run/mcp-stdio"

PORT = 8000
"""Where the server is served, if the pod says nothing of it."""

COMMAND = PREFIX + "stdio-command"


def _wish(spec: Json, said: Mapping[str, str]) -> Wish:
    server = _server(candidates(spec, said))
    return Wish(
        mode="stdio",
        container=server["name"],
        port=usable(_port(server, said.get("port")), lowest=1024),
        command=_command(server, said.get("stdio-command")),
    )


def _server(containers: list[Json]) -> Json:
    """The only one, or the only one with a port that is called mcp."""
    found = containers if len(containers) == 1 else [e for e in containers if declared(e, "mcp")]
    if len(found) != 1:
        raise InjectionRefused(
            f"{len(found) or len(containers)} containers may be the server: {PREFIX}container"
        )
    return found[0]


def _port(server: Json, said: str | None) -> int:
    if said is not None and said.isascii() and said.isdigit():
        return int(said)
    found = declared(server, said or "mcp")
    if said is None and not found:
        return PORT
    if len(found) != 1:
        raise InjectionRefused(f"{len(found)} ports are called {said or 'mcp'!r}: {PREFIX}port")
    return found[0]


def _command(server: Json, said: str | None) -> tuple[str, ...]:
    """What is started where the container does not say it."""
    name = server["name"]
    if server.get("command"):
        if said is not None:
            raise InjectionRefused(
                f"container {name} has a command: there is no need for {COMMAND}"
            )
        return ()
    example = """'["python", "server.py"]'"""
    if said is None:
        raise InjectionRefused(
            f"container {name} has no command, and what its image says is not known here: add it,"
            f" or say {COMMAND}: {example}"
        )
    try:
        words = parse_json(said.encode())
    except (MalformedMessage, UnicodeEncodeError):
        words = None
    is_command = isinstance(words, list) and words and all(isinstance(e, str) for e in words)
    if not is_command:
        raise InjectionRefused(f"{COMMAND} is not a list of words such as {example}")
    return tuple(words)


def _socket(wish: Wish) -> str:
    """By its name the sidecar knows the server, if nobody says another: `server.name`."""
    return f"{STDIO_FOLDER}/{wish.container}.sock"


def _arguments(wish: Wish, injection: Injection) -> list[str]:
    return [f"--listen=[$(POD_IPS)]:{wish.port}", f"--upstream=unix-stdio://{_socket(wish)}"]


def _wraps(wish: Wish, injection: Injection) -> Program:
    options = [f"--socket={_socket(wish)}", f"--peer={injection.sidecar_id}", "--"]
    mounts: list[Json] = [
        {"name": TOOLS, "mountPath": TOOLS_FOLDER, "readOnly": True},
        {"name": STDIO, "mountPath": STDIO_FOLDER},
    ]
    return Program([*shim.words(TOOLS_FOLDER), *options], mounts)


def _first(wish: Wish, injection: Injection) -> list[Json]:
    return [
        {
            **common("mcp-shim", injection),
            "command": ["mcp-sidecar"],
            "args": ["shim", f"--install={TOOLS_FOLDER}"],
            "resources": dict(injection.sidecar_resources),
            "securityContext": restricted(injection.sidecar_id, injection.sidecar_id),
            "volumeMounts": [{"name": TOOLS, "mountPath": TOOLS_FOLDER}, no_token()],
        }
    ]


def _volumes(wish: Wish, injection: Injection) -> list[Json]:
    return [
        {"name": TOOLS, "emptyDir": {"sizeLimit": "128Mi"}},
        {"name": STDIO, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]


def _mounts(wish: Wish, injection: Injection) -> list[Json]:
    return [{"name": STDIO, "mountPath": STDIO_FOLDER, "readOnly": True}]


def _unasked(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    """A kubelet that dials the port meets the sidecar, and there is no port behind it to ask."""
    for each in everybody(spec):
        hooks = each.get("lifecycle") or {}
        there = {**{kind: each.get(kind) for kind in probes.KINDS}, **hooks}
        for name, asking in there.items():
            if probes.asks_server(each, asking or {}, wish.port):
                yield (
                    f"{name} of {each['name']} dials port {wish.port}, and a stdio server has none:"
                    " ask by exec, or leave it to the sidecar, which is ready when the server is"
                )


def _apart(spec: Json, wish: Wish, injection: Injection) -> Iterator[str]:
    for each in spec.get("ephemeralContainers") or ():
        if each.get("targetContainerName") == wish.container:
            yield f"container {each['name']} is put into {wish.container}, among its processes"


MODE_STDIO = Mode(
    annotations=frozenset({"port", "container", "stdio-command"}),
    wish=_wish,
    arguments=_arguments,
    checks=(_unasked, _apart),
    first=_first,
    guarded=False,
    wraps=_wraps,
    volumes=_volumes,
    mounts=_mounts,
)
