"""The sidecar's HTTP path with a decider that says yes at once: everything but OPA.

`python -m tests.bench.pass_through UPSTREAM-URL` prints its port on stdout.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping

import uvloop

from sidecar.config import Http, Identity, Limits, Listen
from sidecar.conversation import Server
from sidecar.pipeline import Pipeline
from sidecar.policy.decision import Decision
from sidecar.policy.enforcement import Rules
from sidecar.policy.identity import Principal, static
from sidecar.protocol.jsonrpc import FROM_CLIENT, JsonObject
from sidecar.protocol.methods import MethodTable
from sidecar.telemetry import Telemetry
from sidecar.transport.authentication import Authentication
from sidecar.transport.exchange import Route, Sessions
from sidecar.transport.http import HttpProxy, serve
from sidecar.transport.relay import HttpRelay
from sidecar.transport.upstream import HttpUpstream


class Yes:
    """Allows everything."""

    async def decide(
        self, document: JsonObject, *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        return Decision(allow=True)


async def main(url: str) -> None:
    limits, listen = Limits(), Listen("127.0.0.1", 0)
    upstream = HttpUpstream(
        url, connect=limits.connect, response=None, message_limit=limits.server_message
    )
    await upstream.start()
    pipeline = Pipeline(
        decider=Yes(), tracer=Telemetry(), recorders=(), rules=Rules(), version="bench"
    )
    proxy = HttpProxy(
        pipeline=pipeline,
        routes={
            "/mcp": Route(HttpRelay(pipeline, upstream), Server("bench"), Sessions(limits.sessions))
        },
        metadata={},
        table=MethodTable.of(),
        authentication=Authentication(Identity(static(Principal("human", "ana", "static")))),
        strictness=FROM_CLIENT,
        limits=limits,
        http=Http(),
        listen=listen,
    )
    _, [bound] = await serve(proxy, listen, 1.0)
    print(bound.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))
