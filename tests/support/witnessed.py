"""A sidecar between a raw client and the permissive server, whose log is the witness.

Under `allow_all` whatever arrives is executed; under `deny_all` nothing may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import permissive_server
from tests.support.processes import (
    ALLOW_ALL,
    DENY_ALL,
    LISTENING,
    Process,
    Served,
    http_sidecar,
)
from tests.support.raw import Pipe, call, code, dump, post, stdio_sidecar

DENIED = -31403
NO_JSON = -32700
NO_MESSAGE = -32600
BAD_PARAMS = -32602
NO_METHOD = -32601
MISMATCH = -32020

POLICIES = {"allow_all": ALLOW_ALL, "deny_all": DENY_ALL}
FIVE_MEGABYTES = 5 * 1024 * 1024
CALL = dump(call(7))


@dataclass(frozen=True, slots=True)
class Piped:
    """A sidecar before the permissive server, and a raw client before the sidecar."""

    allows: bool
    log: Path
    pipe: Pipe


@dataclass(frozen=True, slots=True)
class Listening:
    """A sidecar before the permissive server, over HTTP."""

    allows: bool
    log: Path
    served: Served

    @property
    def url(self) -> str:
        return self.served.url

    def works(self) -> bool:
        """Whether an ordinary call is answered as the policy says."""
        answer = post(self.url, call("an-ordinary-one")).message
        return code(answer) == (None if self.allows else DENIED)


@contextmanager
def piped(policy: str, env: dict[str, str], log: Path) -> Iterator[Piped]:
    server = permissive_server.command(log)
    with stdio_sidecar(server, "--policy", POLICIES[policy], env=env) as pipe:
        yield Piped(policy == "allow_all", log, pipe)


@contextmanager
def listening(policy: str, env: dict[str, str], log: Path) -> Iterator[Listening]:
    with Process(permissive_server.command(log, "--transport", "http")) as server:
        url = server.wait_for(LISTENING)[1]
        with http_sidecar(url, "--policy", POLICIES[policy], env=env) as served:
            yield Listening(policy == "allow_all", log, served)


def table(rows: list[tuple[Any, ...]]) -> list[Any]:
    """Rows whose first cell is what they are called."""
    return [pytest.param(*row[1:], id=str(row[0]).replace(" ", "-")) for row in rows]
