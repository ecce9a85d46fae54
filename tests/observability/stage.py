"""Sidecars that are looked at: real ones, with all that a metric can be about."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.observability.promql import Series, exposed
from tests.support.identity import Idp, idp, policy
from tests.support.issuing import DROP, claims
from tests.support.processes import (
    Served,
    environment,
    get,
    http_sidecar,
    sidecar,
    ticket_desk,
)
from tests.support.raw import Object, call, mirrors, modern, post, request

REMOVED = "delete_ticket"
BOT = claims(sub="ana", groups=DROP, client_id="support-bot")
"""An agent that acts for a human."""
_NUMBERS = count(1)


@dataclass(frozen=True)
class Looked:
    """A sidecar in front of a ticket desk whose tool `delete_ticket` is not pinned."""

    served: Served
    issuer: Idp

    def calls(self) -> None:
        """One of each: allowed, denied near a grant, denied, unknown, no tool, and no message."""
        for name, arguments in (
            ("get_ticket", {"id": 4711}),
            ("refund_ticket", {"id": 4711, "amount": 80}),
            (REMOVED, {"id": 4711}),
            ("no_such_tool", {}),
        ):
            self._post(call(next(_NUMBERS), name, **arguments))
        for method in ("no/such_method", "tools/list"):
            self._post(request(next(_NUMBERS), method))
        post(self.served.url, b"{", self._bearer())

    def _post(self, message: Object) -> None:
        post(self.served.url, modern(message), (*mirrors(message), *self._bearer()))

    def _bearer(self) -> list[tuple[str, str]]:
        return [("Authorization", f"Bearer {self.issuer.token(BOT)}")]

    def metrics(self) -> Series:
        """What it serves to Prometheus."""
        return exposed(get(f"{self.served.admin}/metrics")[1].decode())


@contextmanager
def looked_at(folder: Path, opa: Path, *arguments: str, **variables: str) -> Iterator[Looked]:
    """The sidecar of an agent that acts for ana, with pins, validation and an audit file."""
    folder.mkdir()
    with idp() as issuer, ticket_desk(folder / "log", "--json") as desk:
        config = {
            "catalog": {"pins": str(_pins(folder, desk.url)), "validate": True},
            "audit": {"path": str(folder / "audit")},
            "identity": {"jwt": [issuer.believed()]},
        }
        file = folder / "sidecar.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")
        who = ("--config", file, "--policy", policy(folder, issuer.url))
        with http_sidecar(desk.url, *who, *arguments, env=environment(opa, **variables)) as served:
            yield Looked(served, issuer)


def _pins(folder: Path, url: str) -> Path:
    done = subprocess.run(
        sidecar("pin", "--upstream", url), env=environment(), capture_output=True, check=True
    )
    pins = json.loads(done.stdout)
    del pins["tools"][REMOVED]
    file = folder / "pins.json"
    file.write_text(json.dumps(pins), encoding="utf-8")
    return file
