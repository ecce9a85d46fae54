"""Keeps a replica's certificate, with nobody but the API server to agree with.

All replicas do the same: they read the Secret, write what is due, and fill in `caBundle`. Who
writes first is right, and the others read again: each write names the version that it was made of.

A look goes in this order: registrations, Secret, registrations. An authority is written into the
Secret before it is put into `caBundle`; so who reads `caBundle` first finds a Secret that is at
least as new, and never takes out of it what another replica has just put in.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import SystemRandom
from typing import Any, TypeVar

from cryptography.x509 import Certificate

from sidecar.injector.certificates import Kept, data_of, pem, read, read_pem
from sidecar.injector.cluster import Cluster, ClusterError
from sidecar.injector.injection import Json, Lifetimes
from sidecar.injector.rotation import Moment, renewed

Value = TypeVar("Value")

log = logging.getLogger("sidecar.injector")

KINDS = "mutatingwebhookconfigurations", "validatingwebhookconfigurations"
REGISTRATIONS = "/apis/admissionregistration.k8s.io/v1"
ATTEMPTS = 5
"""How often others may be faster, until that is taken for a failure."""


@dataclass(frozen=True, slots=True)
class Place:
    """What things are called in the cluster."""

    namespace: str
    secret: str = "mcp-opa-sidecar-injector-tls"  # noqa: S105 (its name)
    registration: str = "mcp-opa-sidecar"
    names: Sequence[str] = field(default_factory=tuple)
    """Whose certificate the leaf is."""

    @property
    def secrets(self) -> str:
        """The path of all Secrets of the namespace."""
        return f"/api/v1/namespaces/{self.namespace}/secrets"


@dataclass(frozen=True, slots=True)
class Shared:
    """The Secret as it was read, if there is one, and what is kept in it, if that is whole."""

    secret: Json | None
    kept: Kept | None


class Keeper:
    """Hands `use` each new certificate, with its key; `failed` is told what went wrong where."""

    def __init__(
        self,
        cluster: Cluster,
        place: Place,
        lifetimes: Lifetimes,
        *,
        use: Callable[[bytes, bytes], None],
        failed: Callable[[str], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster, self._place, self._lifetimes = cluster, place, lifetimes
        self._use, self._failed, self._now = use, failed, now
        self._kept: Kept | None = None
        self._held: Mapping[str, frozenset[Certificate]] = {}
        self._problem = "nobody has looked yet"

    @property
    def expiry(self) -> float:
        """When the certificate in use ends, in Unix time; 0 without one."""
        return 0.0 if self._kept is None else self._kept.leaf.ends.timestamp()

    def unready(self) -> str | None:
        """Why nobody would believe this replica; None when both registrations do."""
        if self._kept is None:
            return f"there is no certificate: {self._problem}"
        if self._kept.leaf.ends <= self._now():
            return f"the certificate has ended: {self._problem}"
        signer = self._kept.authority.certificate
        if not all(signer in self._held.get(kind, ()) for kind in KINDS):
            return f"caBundle does not name the certificate's authority: {self._problem}"
        return None

    async def run(self) -> None:
        """Look, again and again; sooner when something went wrong."""
        failures, longest = 0, self._lifetimes.look
        while True:
            try:
                failures = 0 if await self.look() else failures + 1
            except Exception:  # a bug must not be the end of all certificates
                log.exception("certificates: the look failed")
                failures += 1
            pause = min(2.0 ** min(failures - 1, 16), longest) if failures else longest
            await asyncio.sleep(pause * SystemRandom().uniform(0.7, 1.0))

    async def look(self) -> bool:
        """Do whatever is due; whether all of it could be done."""
        problem: ClusterError | None = None
        for _ in range(ATTEMPTS):
            problem = await self._looked()
            if problem is None or problem.status != 409:
                break
        if problem is None and self._problem:
            log.info("certificates: all is well")
        elif problem is not None and self._problem != str(problem):
            log.error("certificates: what there is stays in use: %s", problem)
        self._problem = str(problem or "")
        return problem is None

    async def _looked(self) -> ClusterError | None:
        """Go on where one thing fails: what can be read is of use by itself."""
        problems: list[ClusterError] = []

        async def tried(what: str, work: Awaitable[Value]) -> Value | None:
            try:
                return await work
            except ClusterError as error:
                if error.status != 409:
                    self._failed(what)
                problems.append(error)
                return None

        registered = await tried("registration", self._registrations())
        shared = await tried("secret", self._shared())
        if shared is None:  # nor is `caBundle` written: others may be ahead of what is known here
            return problems[0]
        held = frozenset.intersection(*map(_held, (registered or {"": {}}).values()))
        kept = await tried("secret", self._renewed(shared, held)) or shared.kept
        if registered is not None and kept is not None:
            await tried("registration", self._told(registered, kept))
        return problems[0] if problems else None

    async def _registrations(self) -> dict[str, Json]:
        found = {}
        for kind in KINDS:
            path = f"{REGISTRATIONS}/{kind}/{self._place.registration}"
            found[kind] = await self._cluster.send("GET", path)
        self._held = {kind: _held(each) for kind, each in found.items()}
        return found

    async def _shared(self) -> Shared:
        """Take what is in the Secret."""
        secret = await self._cluster.get(f"{self._place.secrets}/{self._place.secret}")
        kept = None if secret is None else _read(secret)
        if kept is not None:
            self._take(kept)
        return Shared(secret, kept)

    async def _renewed(self, shared: Shared, held: frozenset[Certificate]) -> Kept:
        """Make what is due; it is used once it is in the Secret."""
        moment = Moment(self._now(), self._place.names, self._lifetimes, held)
        due = renewed(shared.kept, moment)
        if due is not shared.kept:
            await self._write(shared.secret, due)
            self._take(due)
        return due

    async def _write(self, secret: Json | None, kept: Kept) -> None:
        data = {name: base64.b64encode(each).decode() for name, each in data_of(kept).items()}
        if secret is None:
            made = {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/tls",
                "metadata": {"name": self._place.secret, "namespace": self._place.namespace},
                "data": data,
            }
            await self._cluster.send("POST", self._place.secrets, made)
        else:  # it names the version that was read
            path = f"{self._place.secrets}/{self._place.secret}"
            await self._cluster.send("PUT", path, {**secret, "data": data})
        log.info("certificates: written to Secret %s", self._place.secret)

    def _take(self, kept: Kept) -> None:
        before, self._kept = self._kept, kept
        if before is None or before.leaf.certificate != kept.leaf.certificate:
            self._use(kept.leaf.pem, kept.leaf.key_pem)
            log.info("certificates: the one in use ends at %s", kept.leaf.ends.isoformat())

    async def _told(self, registered: Mapping[str, Json], kept: Kept) -> None:
        """Have both registrations believe the authorities that count, and nobody else."""
        wanted = base64.b64encode(pem(kept.authorities)).decode()
        for kind, found in registered.items():
            webhooks = found.get("webhooks") or []
            if all(_bundle(each) == wanted for each in webhooks):
                continue
            self._say_dropped(kind, found, kept)
            patch = {
                "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
                "webhooks": [
                    {"name": each["name"], "clientConfig": {"caBundle": wanted}}
                    for each in webhooks
                ],
            }
            path = f"{REGISTRATIONS}/{kind}/{self._place.registration}"
            merge = "application/strategic-merge-patch+json"
            changed = await self._cluster.send("PATCH", path, patch, merge)
            self._held = {**self._held, kind: _held(changed)}
            log.info("certificates: %s %s: caBundle written", kind, self._place.registration)

    def _say_dropped(self, kind: str, configuration: Json, kept: Kept) -> None:
        """What still counts does not go without a word: `caBundle` is the injector's alone."""
        for each in configuration.get("webhooks") or []:
            try:
                others = {*read_pem(base64.b64decode(_bundle(each)))} - {*kept.authorities}
                counting = [other for other in others if other.not_valid_after_utc > self._now()]
                said = ", ".join(sorted(other.subject.rfc4514_string() for other in counting))
            except ValueError:
                said = "what can not be read"
            if said:
                log.warning("certificates: %s %s: caBundle loses %s", kind, each["name"], said)


def _read(secret: Json) -> Kept | None:
    data = {name: base64.b64decode(each) for name, each in (secret.get("data") or {}).items()}
    try:
        return read(data)
    except ValueError as error:
        log.error("certificates: the Secret is not ours, and is written anew: %s", error)
        return None


def _bundle(webhook: Any) -> str:
    return (webhook.get("clientConfig") or {}).get("caBundle") or ""


def _held(configuration: Json) -> frozenset[Certificate]:
    """The authorities that each webhook of a configuration believes."""
    found = []
    for each in configuration.get("webhooks") or []:
        try:
            found.append(frozenset(read_pem(base64.b64decode(_bundle(each)))))
        except ValueError:
            found.append(frozenset())
    return frozenset.intersection(*found) if found else frozenset()
