"""A place where tokens count: an issuer, a ticket desk, and a sidecar that believes the one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from tests.support.issuer_server import IssuerServer, issuer_server
from tests.support.issuing import DROP, Signer, signer
from tests.support.otlp import Sink
from tests.support.processes import STARTER, Served, http_sidecar, patient, ticket_desk
from tests.support.raw import Answer, post

RESOURCE = "https://tickets.example.com/mcp"
METADATA = "https://tickets.example.com/.well-known/oauth-protected-resource/mcp"


class Idp:
    """An issuer in a thread of its own, and the tokens that it has issued."""

    def __init__(self, server: IssuerServer, portal: BlockingPortal) -> None:
        self.server, self._portal = server, portal
        self.url = server.url
        self.issued: list[str] = []

    def token(self, said: dict[str, Any], by: Signer | None = None, **changes: Any) -> str:
        """Issued now, good for an hour, unless `changes` say otherwise."""
        now = time.time()
        whole = {**said, "iss": self.url, "iat": now - 60, "exp": now + 3600, **changes}
        kept = {name: value for name, value in whole.items() if value is not DROP}
        self.issued.append((by or signer()).sign(kept))
        return self.issued[-1]

    def believed(self, **changes: Any) -> dict[str, Any]:
        """How a sidecar is told of it."""
        return {
            "issuer": self.url,
            "audiences": [RESOURCE],
            "jwks": {"interval": 1, "retry": 1},
            "agents": ["support-bot"],
            "interactive": ["desk-web", "support-bot"],
            **changes,
        }

    def stop(self) -> None:
        """Be down."""
        self._portal.call(self.server.stop)


@contextmanager
def idp(*signers: Signer) -> Iterator[Idp]:
    """An issuer with these keys, or with the usual one."""
    serving = issuer_server(*(signers or (signer(),)))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving) as server:
        yield Idp(server, portal)


class Place:
    """Who issues, who serves, and who stands between; `audit` and `sink` are what it leaves."""

    def __init__(self, folder: Path, issuer: Idp, desk: Served, front: Served, sink: Sink) -> None:
        self.issuer, self.desk, self.front, self.sink = issuer, desk, front, sink
        self.log, self.audit = folder / "desk.log", folder / "audit.jsonl"
        self.url = front.url

    def post(self, message: object, token: str | None, *headers: tuple[str, str]) -> Answer:
        """POST with a token, or without one."""
        given = () if token is None else (("Authorization", f"Bearer {token}"),)
        return post(self.url, message, (*given, *headers))

    def records(self) -> list[dict[str, Any]]:
        """What the audit says."""
        if not self.audit.exists():
            return []
        return [json.loads(line) for line in self.audit.read_text("utf-8").splitlines()]


def policy(folder: Path, issuer: str, rego: str = "", *, source: Path = STARTER) -> Path:
    """The policy of `source` for principals of this issuer, and `rego` as one more file."""
    copy = folder / "policy"
    shutil.copytree(source, copy)
    data = copy / "data.yaml"
    if data.exists():
        text = data.read_text(encoding="utf-8")
        assert text.count("default_issuer: static") == 1
        text = text.replace("default_issuer: static", f'default_issuer: "{issuer}"')
        data.write_text(text, encoding="utf-8")
    if rego:
        (copy / "more.rego").write_text(rego, encoding="utf-8")
    return copy


@contextmanager
def guarded(
    folder: Path,
    opa: Path,
    *,
    rego: str = "",
    options: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
    **identity: Any,
) -> Iterator[Place]:
    """A place of its own; the configuration says `identity` besides the issuer, and `more`."""
    with ExitStack() as stack:
        issuer = stack.enter_context(idp())
        desk = stack.enter_context(ticket_desk(folder / "desk.log"))
        sink = stack.enter_context(Sink())
        said = {"jwt": [issuer.believed()], "resource": RESOURCE, **identity}
        file = folder / "sidecar.yaml"
        file.write_text(json.dumps({"identity": said, **(more or {})}), encoding="utf-8")
        deciding = options or ("--policy", str(policy(folder, issuer.url, rego)))
        leaving = ("--audit", str(folder / "audit.jsonl"), "--otlp", sink.url)
        env = {**patient(opa), "OTEL_BSP_SCHEDULE_DELAY": "200"}
        sidecar = http_sidecar(desk.url, "--config", file, *deciding, *leaving, env=env)
        place = Place(folder, issuer, desk, stack.enter_context(sidecar), sink)
        yield place
        print(place.front.process.tail())  # shown when the test failed
