"""The own OPA for tests: started, with a client and readiness in front of it.

>>> async with running(Opa(policy=folder, binary=binary)) as it: await it.allows("echo")
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from sidecar.config import Opa
from sidecar.errors import DecisionError
from sidecar.opa import DecisionClient, OwnOpa, Readiness, question
from tests.support.opa import eventually

BROKEN_REGO = "package mcp.custom\n\nallow if {\n"


def data(*tools: str) -> str:
    """For the policy `CALLERS`: what ann may do."""
    return '{"callers": {"ann": [' + ", ".join(f'"{tool}"' for tool in tools) + "]}}"


class Running:
    """An own OPA with a client and readiness, as the command line puts them together."""

    def __init__(self, own: OwnOpa, settings: Opa) -> None:
        self.own, self.client = own, DecisionClient(own.url)
        self.changes: list[tuple[str | None, str | None]] = []
        self.readiness = Readiness(
            self.client,
            lambda: question(enforcer_version="0", server="s", transport="http"),
            settings,
            own=own,
            on_change=lambda *change: self.changes.append(change),
        )

    async def allows(self, tool: str) -> bool:
        """False also when there is no decision."""
        with suppress(DecisionError):
            document = {"actor": {"id": "ann"}, "target": {"name": tool}}
            return (await self.client.decide(document, deadline=0.5, headers={})).allow
        return False


@asynccontextmanager
async def running(settings: Opa, **options: Any) -> AsyncIterator[Running]:
    own = OwnOpa(settings, **options)
    await own.start()
    everything = Running(own, settings)
    everything.readiness.start()
    try:
        await eventually(lambda: everything.readiness.ready, within=2)
        yield everything
    finally:
        await everything.readiness.stop()
        await everything.client.close()
        await own.stop()


def script(path: Path, text: str) -> None:
    """A command that a test can run in the place of OPA."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
