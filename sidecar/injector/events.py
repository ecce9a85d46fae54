"""Events for the owners of refused pods, who see `kubectl get events` and not the injector's log.

Of core/v1, which takes a new Event that stands for several: to count up one that is there would
need the right to change Events of everybody. No admission waits for an Event. Those that would say
the same again within a while are counted into the next one, and there is room for only so many.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sidecar.injector.admission import Answer
from sidecar.injector.cluster import Cluster, ClusterError
from sidecar.injector.injection import Json
from sidecar.protocol.session import Bounded

log = logging.getLogger("sidecar.injector")

WHILE = 600.0
ROOM = 100
REMEMBERED = 1000
PACE = 0.2
"""Seconds between two Events."""

MAX_MESSAGE, MAX_NAME = 1000, 253
REASONS = {"CREATE": "InjectionRefused", "UPDATE": "ChangeRefused"}
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

COMPONENT = "mcp-opa-sidecar-injector"


@dataclass(slots=True)
class Told:
    """When it was said last, and since when and how often it would have been said again."""

    at: float
    since: str = ""
    more: int = 0


def regarding(request: Json) -> Json:
    """Whom it is about: the controller that makes the pods, else the pod, if it is there or not."""
    namespace, metadata = request.get("namespace") or "", request["object"].get("metadata") or {}
    created, owners = request.get("operation") == "CREATE", metadata.get("ownerReferences")
    for each in owners if isinstance(owners, list) and created else ():
        if isinstance(each, dict) and each.get("controller"):
            return _reference(each, namespace, "apiVersion", "kind", "name", "uid")
    name = metadata.get("name") or metadata.get("generateName") or ""
    pod = {**metadata, "apiVersion": "v1", "kind": "Pod", "name": name}
    there = () if created else ("uid",)
    return _reference(pod, namespace, "apiVersion", "kind", "name", *there)


def _reference(found: Json, namespace: Any, *names: str) -> Json:
    told = {name: str(found.get(name, ""))[:MAX_NAME] for name in names}
    return {**told, "namespace": str(namespace)}


def event(about: Json, reason: str, message: str, first: str, count: int) -> Json:
    """The Event, which stands for `count` refusals since `first`."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{COMPONENT}.", "namespace": about["namespace"]},
        "involvedObject": about,
        "reason": reason,
        "message": message,
        "type": "Warning",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "firstTimestamp": first,
        "lastTimestamp": _now(),
        "count": count,
    }


class Events:
    """Takes refusals at any time, and tells the API server of them one by one."""

    def __init__(
        self,
        cluster: Cluster,
        counted: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._counted, self._clock = cluster, counted, clock
        self._waiting: asyncio.Queue[Json] = asyncio.Queue(ROOM)
        self._told: Bounded[tuple[Any, ...], Told] = Bounded(REMEMBERED)

    def refused(self, request: Json, answer: Answer) -> None:
        """A pod was refused; a dry run leaves nothing, nor does who can not be from a cluster."""
        about, reason = regarding(request), REASONS.get(str(request.get("operation")))
        if request.get("dryRun") or reason is None or not _NAMESPACE.fullmatch(about["namespace"]):
            return
        message, now = answer.reason[:MAX_MESSAGE], self._clock()
        key = (*sorted(about.items()), reason, message)
        before = self._told.get(key)
        if before is not None and now - before.at < WHILE:
            before.since = before.since if before.more else _now()
            before.more += 1
            self._counted("repeated")
            return
        first, count = (before.since, before.more + 1) if before and before.more else (_now(), 1)
        self._told.remember(key, Told(now))
        try:
            self._waiting.put_nowait(event(about, reason, message, first, count))
        except asyncio.QueueFull:
            self._counted("dropped")

    async def run(self) -> None:
        """Send what waits, at a pace; more slowly while the API server takes nothing."""
        failures = 0
        while True:
            waiting = await self._waiting.get()
            failures = 0 if await self._send(waiting) else failures + 1
            await asyncio.sleep(min(PACE * 2 ** min(failures, 16), 60.0))

    async def _send(self, waiting: Json) -> bool:
        """Whether the API server takes Events, if not this one."""
        namespace = waiting["metadata"]["namespace"]
        try:
            await self._cluster.send("POST", f"/api/v1/namespaces/{namespace}/events", waiting)
        except ClusterError as error:
            log.warning("events: not sent: %s", error)
            self._counted("failed")
            return error.status is not None and error.status < 429  # this one, and not the next
        self._counted("sent")
        return True


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
