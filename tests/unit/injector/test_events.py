"""Events about refused pods: whom they are about, how often, and that nothing waits for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sidecar.injector.admission import Answer
from sidecar.injector.cluster import Cluster, ClusterError
from sidecar.injector.events import MAX_MESSAGE, PACE, ROOM, WHILE, Events, regarding
from sidecar.injector.injection import Json

POD = {"apiVersion": "v1", "kind": "Pod", "namespace": "support"}
OWNER = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "tickets-7c9", "uid": "u1"}
REASON = "0 ports are called 'mcp'"


def request(operation: str = "CREATE", *, dry: bool = False, **metadata: Any) -> Json:
    """What the API server asks about a pod."""
    return {
        "uid": "1",
        "namespace": "support",
        "operation": operation,
        "object": {"metadata": {"name": "tickets", **metadata}},
        "dryRun": dry,
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(request(), {**POD, "name": "tickets"}, id="a pod"),
        pytest.param(
            request(name=None, generateName="tickets-"), {**POD, "name": "tickets-"}, id="no name"
        ),
        pytest.param(
            request(ownerReferences=[{**OWNER, "controller": True}]),
            {**OWNER, "namespace": "support"},
            id="a workload's",
        ),
        pytest.param(
            request(ownerReferences=[{**OWNER, "controller": False}]),
            {**POD, "name": "tickets"},
            id="an owner that does not control it",
        ),
        pytest.param(
            request("UPDATE", uid="u2", ownerReferences=[{**OWNER, "controller": True}]),
            {**POD, "name": "tickets", "uid": "u2"},
            id="one that is there",
        ),
        pytest.param(
            request(ownerReferences="x", name="n" * 1000), {**POD, "name": "n" * 253}, id="nonsense"
        ),
        pytest.param(request(ownerReferences=["x"]), {**POD, "name": "tickets"}, id="more of it"),
    ],
)
def test_whom_it_is_about(asked: Json, expected: Json) -> None:
    assert regarding(asked) == expected


class Api(Cluster):
    """Keeps what it is sent; one that is `broken` answers with that status."""

    def __init__(self, broken: int | None = None) -> None:
        super().__init__("https://nowhere", Path("nowhere"))
        self.broken, self.sent, self.news = broken, list[tuple[str, Json]](), asyncio.Event()

    async def send(
        self, method: str, path: str, body: Json | None = None, kind: str = "application/json"
    ) -> Json:
        assert method == "POST"
        assert body is not None
        self.sent.append((path, body))
        self.news.set()
        if self.broken is not None:
            raise ClusterError("no", self.broken)
        return body


class Told:
    """Events, as the webhook tells them."""

    def __init__(self, broken: int | None = None) -> None:
        self.api, self.counted, self.now = Api(broken), list[str](), 0.0
        self.events = Events(self.api, self.counted.append, lambda: self.now)

    def refused(self, asked: Json, reason: str = REASON) -> None:
        self.events.refused(asked, Answer("refused", reason=reason))

    async def next(self) -> Json:
        """What is sent next."""
        self.api.news.clear()
        sending = asyncio.get_running_loop().create_task(self.events.run())
        await self.api.news.wait()
        sending.cancel()
        await asyncio.wait([sending])
        return self.api.sent[-1][1]


async def test_what_is_said() -> None:
    told = Told()
    told.refused(request(ownerReferences=[{**OWNER, "controller": True}]))
    found = await told.next()
    assert told.api.sent[0][0] == "/api/v1/namespaces/support/events"
    assert found["metadata"]["namespace"] == found["involvedObject"]["namespace"] == "support"
    assert found["involvedObject"]["kind"] == "ReplicaSet"
    assert (found["type"], found["reason"]) == ("Warning", "InjectionRefused")
    assert (found["message"], found["count"]) == (REASON, 1)
    told.refused(request("UPDATE", uid="u2"), "x" * 5000)
    found = await told.next()
    assert (found["reason"], len(found["message"])) == ("ChangeRefused", MAX_MESSAGE)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(request(dry=True), id="a dry run"),
        pytest.param({**request(), "operation": "DELETE"}, id="nothing that is refused"),
        *(
            pytest.param({**request(), "namespace": each}, id=f"namespace {each!r}")
            for each in ("", None, "..", "a/../../../b", "a?dryRun=All", "A", "x" * 64, ["a"])
        ),
    ],
)
def test_nothing_is_said(asked: Json) -> None:
    """Nor to any other path: whoever reaches the webhook chooses these texts."""
    told = Told()
    told.refused(asked)
    assert told.events._waiting.empty()


async def test_what_repeats_is_counted_into_the_next() -> None:
    told = Told()
    for told.now in (0, 1, WHILE - 1):
        told.refused(request())
    told.refused(request(name="another"))
    assert (await told.next())["count"] == 1
    assert (await told.next())["involvedObject"]["name"] == "another"
    assert told.counted == ["repeated", "repeated", "sent", "sent"]
    told.now = WHILE
    told.refused(request())
    assert (await told.next())["count"] == 3
    told.now *= 3
    told.refused(request())
    assert (await told.next())["count"] == 1


async def test_there_is_room_for_so_many() -> None:
    told = Told()
    for number in range(ROOM + 7):
        told.refused(request(name=f"tickets-{number}"))
    assert told.counted == ["dropped"] * 7


@pytest.mark.parametrize(
    ("status", "pauses"),
    [
        pytest.param(None, [PACE] * 4, id="none is broken"),
        pytest.param(403, [PACE] * 4, id="a namespace that is going"),
        pytest.param(429, [PACE * 2, PACE * 4, PACE * 8, PACE * 16], id="too much for it"),
        pytest.param(503, [PACE * 2, PACE * 4, PACE * 8, PACE * 16], id="it can not"),
    ],
)
async def test_the_pace(
    monkeypatch: pytest.MonkeyPatch, status: int | None, pauses: list[float]
) -> None:
    """An API server that takes nothing is asked less and less; a bad Event holds up no other."""
    told, slept = Told(status), list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise TimeoutError

    monkeypatch.setattr("sidecar.injector.events.asyncio.sleep", sleep)
    for number in range(4):
        told.refused(request(name=f"tickets-{number}"))
    with pytest.raises(TimeoutError):
        await told.events.run()
    assert slept == pauses
    assert told.counted == ["sent" if status is None else "failed"] * 4
