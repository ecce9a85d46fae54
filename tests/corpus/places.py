"""Who stands at the end of a road: servers of three makes, and the sidecar before them, or nobody.

One OPA a policy answers for all sidecars. A place is a server behind one front of the sidecar.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.corpus.roads import HttpRoad, PipeRoad, Road, SseRoad
from tests.support import permissive_server
from tests.support.processes import LISTENING, ROOT, Process, bridge, http_sidecar, sidecar
from tests.support.raw import Pipe, stdio_sidecar

DIRECT = "direct"
DENY_ALL, ECHO_ONLY, STREAMS_ONLY = "deny_all", "echo_only", "streams_only"
_STREAMS = """package mcp.custom

allow contains {"rule": "streams", "any": true} if input.target.type == "stream"
"""
RULES = {
    STREAMS_ONLY: _STREAMS,
    ECHO_ONLY: _STREAMS
    + """
allow contains {"rule": "echo", "any": true} if {
	input.target.type == "tool"
	input.target.name == "echo"
}
""",
}
"""The rules of the policies that allow something; what `deny_all` denies is everything."""


@dataclass(frozen=True, slots=True)
class Place:
    """A server, the front of the sidecar before it, and the roads that lead there."""

    server: str
    front: str
    roads: tuple[str, ...]

    @property
    def policies(self) -> tuple[str, ...]:
        """Nothing comes to be sent where the stream that a session consists of is denied."""
        return (STREAMS_ONLY if self.front == "sse" else DENY_ALL, ECHO_ONLY)

    def __str__(self) -> str:
        return f"{self.server}-{self.front}"


PLACES = (
    Place("python", "http", ("modern", "session")),
    Place("python-stateless", "http", ("stateless",)),
    Place("v1", "http", ("session",)),
    Place("v2", "http", ("modern", "stateless")),
    Place("permissive", "http", ("modern", "session", "stateless")),
    Place("python", "stdio", ("stdio", "stdio-modern")),
    Place("v1", "stdio", ("stdio",)),
    Place("v2", "stdio", ("stdio", "stdio-modern")),
    Place("permissive", "stdio", ("stdio", "stdio-modern")),
    Place("python", "bridge-http", ("bridge-http",)),
    Place("v1", "bridge-http", ("bridge-http",)),
    Place("v2", "bridge-http", ("bridge-http",)),
    Place("permissive", "bridge-http", ("bridge-http",)),
    Place("python", "bridge-stdio", ("bridge-stdio", "bridge-stdio-modern")),
    Place("v1", "bridge-stdio", ("bridge-stdio",)),
    Place("v2", "bridge-stdio", ("bridge-stdio", "bridge-stdio-modern")),
    Place("permissive", "bridge-stdio", ("bridge-stdio", "bridge-stdio-modern")),
    Place("python", "sse", ("sse",)),
    Place("v1", "sse", ("sse",)),
)


@dataclass(frozen=True, slots=True)
class World:
    """What all places share: a folder, the packages of Node, and a question's address a policy."""

    folder: Path
    node_parts: Path
    opa: Mapping[str, str]
    env: Mapping[str, str]

    def command(self, server: str, transport: str, log: Path) -> list[str]:
        """The command line of a server."""
        if server in ("v1", "v2"):
            script = ROOT / "tests" / "node" / f"server_{server}.mjs"
            return [shutil.which("node") or "node", str(script), str(log), transport]
        if server == "permissive":
            return permissive_server.command(log, "--transport", transport)
        module = [sys.executable, "-m", "tests.corpus.python_server", "--log", str(log)]
        stateless = ["--stateless"] if server == "python-stateless" else []
        return [*module, "--transport", transport, *stateless]

    def environment(self) -> dict[str, str]:
        """The environment of servers and sidecars."""
        return {**self.env, "MCP_NODE_PARTS": str(self.node_parts)}


@contextmanager
def roads_to(world: World, place: Place, policy: str, log: Path) -> Iterator[Callable[[str], Road]]:
    """A maker of roads to a place, which is there meanwhile; `direct` is without a sidecar."""
    options = () if policy == DIRECT else ("--opa", world.opa[policy])
    env = world.environment()
    with ExitStack() as stack:
        if place.front in ("http", "bridge-stdio", "sse"):
            transport = "sse" if place.front == "sse" else "http"
            command = world.command(place.server, transport, log)
            server = stack.enter_context(Process(command, env=env))
            url = server.wait_for(LISTENING)[1]
            if place.front == "bridge-stdio":
                yield _piped(stack, lambda: _bridged(url, options, env))
                return
            if policy != DIRECT:
                url = stack.enter_context(http_sidecar(url, *options, env=env)).url
            yield _connected(stack, url)
            return
        command = world.command(place.server, "stdio", log)
        if place.front == "bridge-http":
            served = stack.enter_context(bridge(command, *options, env=env))
            yield _connected(stack, served.url)
        elif policy == DIRECT:
            yield _piped(stack, lambda: _process(command, env))
        else:
            yield _piped(stack, lambda: stdio_sidecar(command, *options, env=env))


def _connected(stack: ExitStack, url: str) -> Callable[[str], Road]:
    kind = SseRoad if url.endswith("/sse") else HttpRoad
    return lambda name: _closing(stack, kind(name, url))


def _piped(
    stack: ExitStack, start: Callable[[], AbstractContextManager[Pipe]]
) -> Callable[[str], Road]:
    return lambda name: _closing(stack, PipeRoad(name, start))


def _closing(stack: ExitStack, road: Road) -> Road:
    stack.callback(road.close)
    return road


@contextmanager
def _process(command: list[str], env: Mapping[str, str]) -> Iterator[Pipe]:
    """A raw client of a command."""
    with Process(command, env=env, pipes=True) as process:
        pipe = Pipe(process)
        try:
            yield pipe
        finally:
            process.stop()
            pipe.reader.join(10)


def _bridged(
    url: str, options: tuple[str, ...], env: Mapping[str, str]
) -> AbstractContextManager[Pipe]:
    return _process([*sidecar("stdio", *options), "--upstream", url], env)
