"""Whether OPA can be asked, found out by asking it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from sidecar.config import Opa
from sidecar.errors import DecisionError
from sidecar.opa.background import Background
from sidecar.opa.client import UNTRACED
from sidecar.opa.expected import Stamp
from sidecar.policy.decision import Decision
from sidecar.policy.document import Environment, canary
from sidecar.policy.identity import UNKNOWN
from sidecar.protocol.jsonrpc import JsonObject

logger = logging.getLogger("sidecar.opa")

RETRY = 0.2  # seconds between questions while there is no answer
UNMARKED = 4.0  # seconds after which a policy without a watermark may have changed unseen


class Decider(Protocol):
    """What `Readiness` asks: a `DecisionClient`, or what stands in for it."""

    async def decide(
        self, document: JsonObject, *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        """As `DecisionClient.decide`."""
        ...


class Served(Protocol):
    """The own OPA, as far as readiness goes."""

    on_served: Callable[[], None]

    @property
    def lagging(self) -> bool:
        """As `OwnOpa.lagging`."""
        ...

    def status(self) -> JsonObject:
        """As `OwnOpa.status`."""
        ...


def question(*, enforcer_version: str, server: str, transport: str) -> JsonObject:
    """The canary: a listing by nobody, now."""
    return canary(Environment(enforcer_version, server, transport, time=timestamp()), UNKNOWN)


class Readiness:
    """Whether OPA decides, found out by asking it: any valid decision counts, allow or deny.

    `on_change(revision, watermark)` is called when an answer differs from the one before in either,
    and every 4 s while answers have no watermark: then nobody can say that nothing has changed.
    Asked every `settings.canary` seconds; every 0.2 s while there is no answer; at once when the
    own OPA serves a new revision.
    """

    def __init__(
        self,
        client: Decider,
        ask: Callable[[], JsonObject],
        settings: Opa,
        *,
        own: Served | None = None,
        stamp: Stamp | None = None,
        on_change: Callable[[str | None, str | None], None] | None = None,
    ) -> None:
        self._client, self._question, self._settings = client, ask, settings
        self._own, self._stamp, self._on_change = own, stamp, on_change
        self._nudge = asyncio.Event()
        self._task: Background | None = None
        self._asked = False
        self._told = time.monotonic()
        self.revision: str | None = None
        self._revised = time.monotonic()
        self.watermark: str | None = None
        self.error: str | None = "OPA has not been asked yet"
        self.since = timestamp()
        if own is not None:
            own.on_served = self._nudge.set

    @property
    def age(self) -> float:
        """Seconds for which the policy's revision has been seen: it is at least that old."""
        return time.monotonic() - self._revised

    @property
    def ready(self) -> bool:
        """OPA decides, and the policy that it decides by is the one it should."""
        return self.error is None and not self.lagging

    @property
    def lagging(self) -> bool:
        """A revision has passed the check, and OPA decides by another one 5 s later."""
        if self._stamp is not None and self._stamp.lagging(self.revision):
            return True
        return self._own is not None and self._own.lagging

    def start(self) -> None:
        """Ask for the first time, now, and go on asking."""
        self._task = Background(self._step, "canary")

    async def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            await self._task.stop()

    def status(self) -> JsonObject:
        """For `/readyz`: `{ready, opa: {answers, since, error?}, policy: {revision, …}}`."""
        opa: JsonObject = {"answers": self.error is None, "since": self.since}
        if self.error is not None:
            opa["error"] = self.error
        policy: JsonObject = {"revision": self.revision}
        if self._stamp is not None:
            policy["stamped"] = self._stamp.expected.revision
        policy |= self._own.status() if self._own else {}
        return {"ready": self.ready, "opa": opa, "policy": policy}

    async def _step(self) -> None:
        self._nudge.clear()
        if self._stamp is not None:
            self._stamp.look()
        await self._ask()
        every = self._settings.canary
        with suppress(TimeoutError):
            async with asyncio.timeout(every if self.error is None else min(every, RETRY)):
                await self._nudge.wait()

    async def _ask(self) -> None:
        try:
            decision = await self._client.decide(
                self._question(), deadline=self._settings.deadline, headers=UNTRACED
            )
        except DecisionError as error:
            self._turn(f"{error.detail}: {error}")
            return
        self._turn(None)
        before, now = (self.revision, self.watermark), (decision.revision, decision.watermark)
        self.revision, self.watermark = now
        if before[0] != now[0]:
            self._revised = time.monotonic()
        asked, self._asked = self._asked, True
        unseen = decision.watermark is None and time.monotonic() - self._told >= UNMARKED
        if asked and (before != now or unseen) and self._on_change is not None:
            self._told = time.monotonic()
            self._on_change(*now)

    def _turn(self, error: str | None) -> None:
        if (error is None) != (self.error is None):
            self.since = timestamp()
            if error is None:
                logger.info("opa_ready")
            else:
                logger.error("opa_not_ready error=%s", error)
        self.error = error


def timestamp() -> str:
    """Now, RFC 3339 in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
