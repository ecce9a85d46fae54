"""Clients × transports: what each client sees with the sidecar between, and what it sees without.

A client goes every way at once, in one process of its own. What it saw on a way is compared with
what it saw of the same server on the server's own transport; `EXPECTED` has what is different in
the nature of the thing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.processes import (
    ALLOW_ALL,
    LISTENING,
    ROOT,
    Process,
    bridge,
    http_sidecar,
    patient,
    sidecar,
)

SERVER = (sys.executable, "-m", "tests.clients.server")
NODE = ROOT / "tests" / "node"
MODERN = "2026-07-28"
LEGACY = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
TOUR_SECONDS = 150.0
DIRECT = "direct "

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Client:
    """A client that speaks one revision, or finds out (`auto`)."""

    kind: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.mode}"

    @property
    def revision(self) -> str:
        """What it and a server that knows all revisions agree on."""
        return {"auto": MODERN, "legacy": LEGACY[-1]}.get(self.mode, self.mode)

    def command(self) -> list[str]:
        if self.kind == "python":
            return [sys.executable, "-m", "tests.clients.python_client", self.mode]
        script = (
            NODE / {"typescript v1": "client_v1.mjs", "typescript v2": "client_v2.mjs"}[self.kind]
        )
        return [shutil.which("node") or "node", str(script), self.mode]


CLIENTS = (
    *(Client("python", mode) for mode in (*LEGACY, MODERN, "auto")),
    *(Client("typescript v1", mode) for mode in LEGACY),
    *(Client("typescript v2", mode) for mode in ("legacy", MODERN, "auto")),
)


@dataclass(frozen=True, slots=True)
class Way:
    """A sidecar: what clients speak to it, and what it speaks to the server."""

    name: str
    spoken: str
    served: str

    def takes(self, client: Client) -> bool:
        """Whether this way is for such a client: a shared child is for stateless ones alone."""
        return self.name != "shared bridge" or client.revision == MODERN


WAYS = (
    Way("http", spoken="http", served="http"),
    Way("sse", spoken="sse", served="sse"),
    Way("stdio", spoken="stdio", served="stdio"),
    Way("bridge", spoken="http", served="stdio"),
    Way("shared bridge", spoken="http", served="stdio"),
    Way("stdio to http", spoken="stdio", served="http"),
    Way("stdio to sse", spoken="stdio", served="sse"),
)


# ── What is different in the nature of the thing ──────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Difference:
    """A way that is not like the server's own transport for clients of a mode, and why."""

    way: str
    mode: str
    cell: str
    why: str
    like: str | None = None
    """The mode of the client that this one is like."""
    changed: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Steps that come out differently: what is seen, made of what is seen without the sidecar."""
    refused: tuple[str, ...] = ()
    """Nothing works, and a part of what each step says instead."""


def _unlogged(step: Any) -> Any:
    said, _ = step
    return [said, []]


_NO_SESSION = "a child belongs to a session, and a stateless client has none"
_NOBODYS = "a line of the log names no request, and the child has many callers: it is for nobody"
_UNSUPPORTED = ("-32022", "Unsupported protocol version", "mode 'pin' forbids a legacy fallback")

EXPECTED = (
    Difference("bridge", "auto", "shakes hands", _NO_SESSION, like=LEGACY[-1]),
    Difference("bridge", MODERN, "refused", _NO_SESSION, refused=_UNSUPPORTED),
    *(
        Difference("shared bridge", mode, "no log", _NOBODYS, changed={"log": _unlogged})
        for mode in (MODERN, "auto")
    ),
)


def expected_of(way: Way, client: Client) -> Difference | None:
    """The row for this cell, if there is one."""
    rows = [each for each in EXPECTED if (each.way, each.mode) == (way.name, client.mode)]
    return rows[0] if rows else None


def twin(client: Client, mode: str) -> Client:
    """The client of the same kind which always does what this one does where it can do no more."""
    return Client(client.kind, "legacy" if client.kind == "typescript v2" else mode)


# ── The tours ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Verdict:
    """A cell of the table, and what is wrong with it."""

    cell: str
    wrong: list[str]


@dataclass(slots=True)
class Matrix:
    """Every way, open, and the tours that clients took."""

    addresses: Mapping[str, Object]
    env: Mapping[str, str]
    _seen: dict[Client, dict[str, Object]] = field(default_factory=dict)

    def seen(self, client: Client) -> dict[str, Object]:
        """What the client saw, by the name of the way.

        Raises:
            subprocess.TimeoutExpired: it hangs.
            AssertionError: it fails.

        """
        if client not in self._seen:
            self._seen[client] = self._tour(client)
        return self._seen[client]

    def expected(self, way: Way, client: Client) -> Object:
        """What it must see: the server on its own transport, with the sessions of the way's."""
        row = expected_of(way, client)
        like = client if row is None or row.like is None else twin(client, row.like)
        direct = self.seen(like)
        tour = {**direct[DIRECT + way.served], "session": direct[DIRECT + way.spoken]["session"]}
        changed = {} if row is None else row.changed
        return {**tour, **{step: change(tour[step]) for step, change in changed.items()}}

    def verdict(self, way: Way, client: Client) -> Verdict:
        """How a cell came out."""
        row, seen = expected_of(way, client), self.seen(client)[way.name]
        if row is not None and row.refused:
            wrong = _not_refused(seen, row.refused)
        else:
            wrong = differences(self.expected(way, client), seen)
        return Verdict("DIFFERENT" if wrong else "same" if row is None else row.cell, wrong)

    def _tour(self, client: Client) -> dict[str, Object]:
        left_out = {way.name for way in WAYS if not way.takes(client)}
        ways = {name: each for name, each in self.addresses.items() if name not in left_out}
        done = subprocess.run(
            client.command(),
            input=json.dumps(ways),
            env=dict(self.env),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TOUR_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{client.name}:\n{done.stderr[-4000:]}"
        return dict(json.loads(done.stdout))


def differences(expected: Object, seen: Object) -> list[str]:
    """The steps that came out differently."""
    steps = [*expected, *(seen.keys() - expected.keys())]
    return [
        f"{step}:\n  direct   {_shown(expected, step)}\n  sidecar  {_shown(seen, step)}"
        for step in steps
        if (step in expected, expected.get(step)) != (step in seen, seen.get(step))
    ]


def _shown(tour: Object, step: str) -> str:
    return json.dumps(tour[step])[:600] if step in tour else "not there"


def _not_refused(seen: Object, parts: tuple[str, ...]) -> list[str]:
    steps = [step for step in seen if step not in ("revision", "session", "connects")]
    outcomes = {step: json.dumps(seen[step]) for step in steps or ["connects"]}
    return [
        f"{step} was not refused: {outcome[:600]}"
        for step, outcome in outcomes.items()
        if not any(part in outcome for part in parts)
    ]


@contextmanager
def matrix(parts: Path, opa: Path) -> Iterator[Matrix]:
    """Start what is shared by all clients: two servers, and a sidecar for each way over HTTP."""
    env = {**patient(opa), "MCP_NODE_PARTS": str(parts)}
    shared = {**env, "MCP_SIDECAR_BRIDGE__SHARED": "true"}
    policy = ("--policy", ALLOW_ALL)
    with ExitStack() as stack:
        enter = stack.enter_context
        url, sse = (
            enter(Process([*SERVER, "--transport", each])).wait_for(LISTENING)[1]
            for each in ("http", "sse")
        )
        addresses: dict[str, Object] = {
            f"{DIRECT}http": {"url": url},
            f"{DIRECT}sse": {"sse": sse},
            f"{DIRECT}stdio": {"command": SERVER},
            "http": {"url": enter(http_sidecar(url, *policy, env=env)).url},
            "sse": {"sse": enter(http_sidecar(sse, *policy, env=env)).url},
            "stdio": {"command": sidecar("stdio", *policy, "--", *SERVER)},
            "bridge": {"url": enter(bridge(SERVER, *policy, env=env)).url},
            "shared bridge": {"url": enter(bridge(SERVER, *policy, env=shared)).url},
            "stdio to http": {"command": sidecar("stdio", *policy, "--upstream", url)},
            "stdio to sse": {"command": sidecar("stdio", *policy, "--upstream", sse)},
        }
        yield Matrix(addresses, env)


# ── The table ─────────────────────────────────────────────────────────────────────────────────────

LEGEND = (
    "same: every step came out as without the sidecar, down to the message of each error",
    *sorted({f"{each.cell}: {each.why}" for each in EXPECTED}),
)


def heading() -> str:
    """The ways, above the rows."""
    return f"{'client':26}{'revision':12}" + "".join(f"{way.name:15}" for way in WAYS)


def line(client: Client, cells: Mapping[str, str]) -> str:
    """One client, whose cells are known by the names of the ways; "-" where there is none."""
    row = "".join(f"{cells.get(way.name, '-'):15}" for way in WAYS)
    return f"{client.name:26}{client.revision:12}{row}".rstrip()
