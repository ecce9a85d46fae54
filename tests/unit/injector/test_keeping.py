"""Replicas that agree through the API server alone, whatever comes between their requests."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from cryptography.x509 import Certificate
from hypothesis import given
from hypothesis import strategies as st

from sidecar.injector.certificates import read, read_pem
from sidecar.injector.cluster import Cluster, ClusterError
from sidecar.injector.injection import Json, Lifetimes
from sidecar.injector.keeping import KINDS, REGISTRATIONS, Keeper, Place

START = datetime(2026, 1, 1, tzinfo=UTC)
PLACE = Place("system", names=("injector.system.svc",))
SECRET = f"{PLACE.secrets}/{PLACE.secret}"
PATHS = [f"{REGISTRATIONS}/{kind}/{PLACE.registration}" for kind in KINDS]


class Api(Cluster):
    """An API server in memory: versions, conflicts, and others who come between two requests."""

    def __init__(self, chance: Random | None = None) -> None:
        super().__init__("https://nowhere", Path("nowhere"))
        self.chance = chance or Random(0)
        self.objects: dict[str, Json] = {}
        self.forbidden: set[tuple[str, str]] = set()
        self.unlucky = 0.0
        self.versions = 0
        self.keepers: list[Kept] = []
        for path in PATHS:
            names = ("pod.example.com", "namespace.example.com")
            webhooks = [{"name": name, "clientConfig": {"url": "https://x"}} for name in names]
            self._store(path, {"metadata": {}, "webhooks": webhooks})

    async def send(
        self, method: str, path: str, body: Json | None = None, kind: str = "application/json"
    ) -> Json:
        for _ in range(self.chance.randrange(3)):
            await asyncio.sleep(0)
        if (method, path) in self.forbidden or self.chance.random() < self.unlucky:
            raise ClusterError("it says 403: no", 403)
        answer: Json = getattr(self, f"_{method.lower()}")(path, body)
        for _ in range(self.chance.randrange(3)):
            await asyncio.sleep(0)
        return answer

    def _get(self, path: str, body: None) -> Json:
        if path not in self.objects:
            raise ClusterError("it says 404: not found", 404)
        return self.objects[path]

    def _post(self, path: str, body: Json) -> Json:
        place = f"{path}/{body['metadata']['name']}"
        if place in self.objects:
            raise ClusterError("it says 409: already exists", 409)
        return self._store(place, body)

    def _put(self, path: str, body: Json) -> Json:
        self._same_version(path, body)
        return self._store(path, body)

    def _patch(self, path: str, body: Json) -> Json:
        self._same_version(path, body)
        told = {each["name"]: each["clientConfig"] for each in body["webhooks"]}
        webhooks = [
            {**each, "clientConfig": {**each["clientConfig"], **told.get(each["name"], {})}}
            for each in self.objects[path]["webhooks"]
        ]
        changed = self._store(path, {**self.objects[path], "webhooks": webhooks})
        for each in self.keepers:
            each.look_at(self)
        return changed

    def _same_version(self, path: str, body: Json) -> None:
        found = self.objects.get(path, {"metadata": {}})["metadata"].get("resourceVersion")
        if body["metadata"]["resourceVersion"] != found:
            raise ClusterError("it says 409: the object has been modified", 409)

    def _store(self, path: str, body: Json) -> Json:
        self.versions += 1
        metadata = {**body["metadata"], "resourceVersion": str(self.versions)}
        self.objects[path] = {**body, "metadata": metadata}
        return self.objects[path]

    def bundles(self) -> list[str]:
        """What each webhook believes."""
        return [
            each["clientConfig"].get("caBundle", "")
            for path in PATHS
            for each in self.objects[path]["webhooks"]
        ]

    def believed(self) -> frozenset[Certificate]:
        read = [frozenset(read_pem(base64.b64decode(each))) for each in self.bundles()]
        return frozenset.intersection(*read)

    def secret(self) -> dict[str, bytes]:
        data = self.objects[SECRET]["data"]
        return {name: base64.b64decode(value) for name, value in data.items()}


class Kept:
    """One replica, and what it serves."""

    def __init__(self, api: Api) -> None:
        self.now = START
        self.served: Certificate | None = None
        self.used = 0
        self.failures: list[str] = []
        self.lost: list[str] = []
        self.keeper = Keeper(
            api, PLACE, Lifetimes(), use=self._use, failed=self.failures.append, now=self._now
        )

    def _now(self) -> datetime:
        return self.now

    def _use(self, chain: bytes, key: bytes) -> None:
        assert b"PRIVATE KEY" in key
        [self.served] = read_pem(chain)
        self.used += 1

    def is_believed(self, api: Api) -> bool:
        """Whether an API server that goes by what is written would believe it."""
        assert self.served is not None
        return any(_signed(self.served, each) for each in api.believed())

    def look_at(self, api: Api) -> None:
        """Keep what would be a gap, whenever somebody has written."""
        if self.keeper.unready() is None and not self.is_believed(api):
            self.lost.append(f"{self.now}: {api.bundles()}")


def _signed(leaf: Certificate, authority: Certificate) -> bool:
    return leaf.issuer == authority.subject and _verifies(leaf, authority)


def _verifies(leaf: Certificate, authority: Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(authority)
    except Exception:
        return False
    return True


def alone(api: Api) -> Kept:
    made = Kept(api)
    api.keepers.append(made)
    return made


DAYS = (0, 0.1, 20, 41, 334, 334.1, 335.2, 335.3, 364, 365, 370, 700, 701, 702)


@given(st.randoms(use_true_random=True), st.sampled_from([0.0, 0.0, 0.05, 0.2]))
def test_replicas_agree_and_are_believed(chance: Random, unlucky: float) -> None:
    async def run() -> None:
        api = Api(chance)
        replicas = [alone(api) for _ in range(3)]
        for day in DAYS:
            for each in replicas:
                each.now = START + timedelta(days=day)
            api.unlucky = unlucky
            await asyncio.gather(*(each.keeper.look() for each in replicas))
            api.unlucky = 0.0
            done = await asyncio.gather(*(each.keeper.look() for each in replicas))
            assert done == [True, True, True]
            assert [each.keeper.unready() for each in replicas] == [None, None, None]
            data = api.secret()
            assert {each.served for each in replicas} == {read(data).leaf.certificate}
            assert {*api.bundles()} == {base64.b64encode(data["ca.crt"]).decode()}
            assert [each.lost for each in replicas] == [[], [], []]

    asyncio.run(run())


def looked(api: Api, *days: float) -> tuple[Kept, list[bool]]:
    """A replica that looked on these days, and whether all could be done."""
    made = alone(api)

    async def run() -> list[bool]:
        done = []
        for day in days:
            made.now = START + timedelta(days=day)
            done.append(await made.keeper.look())
        return done

    return made, asyncio.run(run())


def test_nothing_is_written_or_used_twice() -> None:
    api = Api()
    made, done = looked(api, 0, 0, 1, 19)
    assert done == [True] * 4
    assert made.used == 1
    assert api.versions == len(PATHS) + 1 + len(PATHS)


def test_what_can_not_be_kept_is_not_used() -> None:
    api = Api()
    api.forbidden.add(("POST", PLACE.secrets))
    made, done = looked(api, 0)
    assert (done, made.served) == ([False], None)
    assert made.keeper.expiry == 0
    assert made.failures == ["secret"]
    assert made.keeper.unready() == "there is no certificate: it says 403: no"
    assert api.believed() == frozenset()


def test_who_may_write_nothing_serves_what_others_write() -> None:
    api = Api()
    looked(api, 0)
    api.forbidden |= {("PUT", SECRET), *(("PATCH", path) for path in PATHS)}
    made, done = looked(api, 0, 19, 25)
    assert done == [True, True, False]
    assert made.keeper.unready() is None
    assert made.failures == ["secret"]


def test_who_can_not_read_goes_on_with_what_it_has() -> None:
    api = Api()
    made, _ = looked(api, 0)

    async def again(day: float) -> bool:
        made.now = START + timedelta(days=day)
        return await made.keeper.look()

    api.forbidden |= {("GET", SECRET), *(("GET", path) for path in PATHS)}
    assert not asyncio.run(again(29.9))
    assert made.keeper.unready() is None
    assert not asyncio.run(again(30))
    assert made.keeper.unready() == "the certificate has ended: it says 403: no"


def test_what_is_only_remembered_is_not_written() -> None:
    """Another replica may have put a newer authority into the Secret and into `caBundle`."""
    api = Api()
    made, _ = looked(api, 0)
    for path in PATHS:
        for each in api.objects[path]["webhooks"]:
            each["clientConfig"]["caBundle"] = ""
    api.forbidden.add(("GET", SECRET))
    assert not asyncio.run(made.keeper.look())
    assert {*api.bundles()} == {""}
    api.forbidden.clear()
    assert asyncio.run(made.keeper.look())
    assert made.is_believed(api)


def test_a_registration_that_is_not_there() -> None:
    api = Api()
    del api.objects[PATHS[1]]
    made, done = looked(api, 0)
    assert done == [False]
    assert made.served is not None
    assert "caBundle does not name" in str(made.keeper.unready())


def test_what_is_believed_beside_ours_is_dropped_with_a_word(caplog: Any) -> None:
    api, other = Api(), Api()
    looked(other, 0)
    [stranger] = {*other.bundles()}
    for path, bundle in zip(PATHS, (stranger, "bm9uc2Vuc2U="), strict=True):
        api.objects[path]["webhooks"][0]["clientConfig"]["caBundle"] = bundle
    made, _ = looked(api, 0)
    assert made.keeper.unready() is None
    said = [each for each in caplog.messages if "caBundle loses" in each]
    assert len(said) == 2
    assert "mcp-opa-sidecar injector 2026-01-01" in said[0]
    assert "what can not be read" in said[1]


def test_a_secret_keeps_what_others_add_to_it() -> None:
    api = Api()
    looked(api, 0)
    api.objects[SECRET]["metadata"]["labels"] = {"team": "platform"}
    looked(api, 25)
    assert api.objects[SECRET]["metadata"]["labels"] == {"team": "platform"}
    assert api.objects[SECRET]["type"] == "kubernetes.io/tls"


def test_a_conflict_without_end_is_a_failure() -> None:
    class Busy(Api):
        def _put(self, path: str, body: Json) -> Json:
            raise ClusterError("it says 409: the object has been modified", 409)

    api = Busy()
    made, done = looked(api, 0, 25)
    assert done == [True, False]
    assert made.keeper.unready() is None
