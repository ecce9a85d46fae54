"""Replicas that make their certificates themselves: from nothing, together, and under load."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from cryptography import x509

from tests.cluster.control_plane import Cluster, Json
from tests.cluster.registered import KINDS, pod_of
from tests.cluster.self_signed import (
    ACCOUNT,
    NAMESPACES,
    REGISTRATION,
    SECRET,
    SYSTEM,
    Replica,
    Rig,
    rig,
    rules,
)
from tests.support.certificates import Authority
from tests.support.processes import wait_until

pytestmark = pytest.mark.timeout(180)

ONE, TWO = NAMESPACES
SHORT = {"authority": 36, "leaf": 9, "overlap": 3, "look": 1}
QUICK = {"look": 1}


@pytest.fixture(scope="module")
def the_rig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(cluster, tmp_path_factory.mktemp("account")) as made:
        yield made


@pytest.fixture
def empty(the_rig: Rig) -> Rig:
    """Nothing is there yet."""
    the_rig.empty()
    return the_rig


@pytest.fixture
def replica(empty: Rig) -> Iterator[Replica]:
    """One that the API server believes."""
    with empty.replica(certificates=QUICK) as made:
        empty.wait_asked(made)
        yield made


def certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_from_nothing(empty: Rig) -> None:
    assert "failed calling webhook" in empty.refusal(ONE)
    assert empty.secret() == {}
    with empty.replica() as replica:
        empty.wait_asked(replica)
        found = empty.secret()
        assert set(found) == {"tls.crt", "tls.key", "ca.crt", "ca.key"}
        assert empty.bundles() == {found["ca.crt"]}
        assert replica.certificate() == certificate(found["tls.crt"])
        made = empty.cluster.create(pod_of(ONE), "--dry-run=server")
        assert made["metadata"]["labels"]["mcp-opa-sidecar.io/injected"] == "true"
        ends = certificate(found["tls.crt"]).not_valid_after_utc.timestamp()
        assert replica.metric("injector_certificate_expiry_timestamp_seconds") == ends


def test_a_second_start_changes_nothing(empty: Rig) -> None:
    with empty.replica() as replica:
        empty.wait_asked(replica)
    before, bundles = empty.secret(), empty.bundles()
    with empty.replica() as replica:
        empty.wait_asked(replica)
        assert (empty.secret(), empty.bundles()) == (before, bundles)


@pytest.mark.parametrize("_again", range(3))
def test_two_at_once_agree(empty: Rig, _again: int) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(empty.started(each, {})) for each in NAMESPACES]
        replicas = [
            Replica(process, name, empty.ports[name])
            for process, name in zip(processes, NAMESPACES, strict=True)
        ]
        empty.wait_asked(*replicas)
        found = empty.secret()
        served = {each.certificate() for each in replicas}
        assert served == {certificate(found["tls.crt"])}
        assert empty.bundles() == {found["ca.crt"]}
        assert len(empty.authorities()) == 1


def test_rotation_under_load(empty: Rig) -> None:
    """Leaves and authorities come and go, and no review is lost, by whichever replica."""
    ended, failures, reviewed = threading.Event(), list[str](), dict.fromkeys(NAMESPACES, 0)
    leaves, seen = set[x509.Certificate](), set[x509.Certificate]()

    def load(namespace: str) -> None:
        while not ended.is_set():
            given = pod_of(namespace)
            done = empty.cluster.run("create", "--dry-run=server", "-f", "-", given=given)
            reviewed[namespace] += 1
            if done.returncode != 0:
                failures.append(done.stderr)

    with (
        empty.replica(ONE, certificates=SHORT) as one,
        empty.replica(TWO, certificates=SHORT) as two,
    ):
        empty.wait_asked(one, two)
        [first] = empty.authorities()
        threads = [threading.Thread(target=load, args=(each,)) for each in NAMESPACES]
        for each in threads:
            each.start()

        def gone() -> bool:
            now = empty.authorities()
            seen.update(now)
            leaves.update((one.certificate(), two.certificate()))
            return first not in now or bool(failures)

        try:
            wait_until(gone, "the first authority is gone", 90)
            before = dict(reviewed)
            wait_until(
                lambda: failures or all(reviewed[each] > before[each] + 9 for each in NAMESPACES),
                "more reviews without it",
            )
        finally:
            ended.set()
            for each in threads:
                each.join()
    assert failures == []
    assert len(seen) >= 2
    assert len(leaves) >= 4
    assert min(reviewed.values()) > 20


def test_who_may_not_write_goes_on(empty: Rig, replica: Replica) -> None:
    before = replica.certificate()
    empty.disentitle()
    try:
        replica.process.wait_for("what there is stays in use: it says 403")
        name = 'injector_cluster_errors_total{what="secret"}'
        wait_until(lambda: replica.metric(name) > 2, "errors are counted")
        assert replica.is_ready()
        assert replica.certificate() == before
        empty.wait_asked(replica)
    finally:
        empty.entitle()
    known = len([each for each in replica.process.lines if "all is well" in each])
    wait_until(
        lambda: sum("all is well" in each for each in replica.process.lines) > known,
        "it can look again",
    )


def test_what_is_changed_by_others_is_put_right(empty: Rig, replica: Replica) -> None:
    right = empty.secret()["ca.crt"]
    [kind, _] = KINDS
    for wrong in ("", base64.b64encode(b"nonsense").decode(), _stranger()):
        patch = [{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": wrong}]
        empty.cluster.kubectl("patch", kind, REGISTRATION, "--type=json", "-p", json.dumps(patch))
        wait_until(lambda: empty.bundles() == {right}, "caBundle is as it was")
    replica.process.wait_for("caBundle loses what can not be read")
    replica.process.wait_for("caBundle loses .*trustme")
    empty.wait_asked(replica)


def _stranger() -> str:
    return base64.b64encode(Authority().pem).decode()


@pytest.mark.parametrize("what", ["deleted", "somebody else's"])
def test_a_secret_that_is_lost_is_made_anew(empty: Rig, replica: Replica, what: str) -> None:
    before = replica.certificate()
    if what == "deleted":
        empty.cluster.kubectl("delete", "secret", SECRET, "-n", SYSTEM)
    else:
        patch = {"data": {"tls.key": base64.b64encode(b"mine").decode()}}
        command = ("patch", "secret", SECRET, "-n", SYSTEM, "-p", json.dumps(patch))
        empty.cluster.kubectl(*command)
        replica.process.wait_for("the Secret is not ours, and is written anew")
    wait_until(lambda: replica.certificate() != before, "another certificate")
    empty.wait_asked(replica)
    assert len(empty.authorities()) == 1


# ── Rights ────────────────────────────────────────────────────────────────────────────────────────


def rule(group: str, resource: str, *verbs: str, name: str | None = None) -> tuple[Any, ...]:
    return (group, resource, frozenset(verbs), name)


def beyond_anybody(cluster: Cluster, namespace: str) -> set[tuple[Any, ...]]:
    """What the account may do, and another of the same namespace may not."""
    anybody = rules(cluster, "default", namespace)
    found = [each for each in rules(cluster, ACCOUNT, namespace) if each not in anybody]
    return {
        rule(group, resource, *each["verbs"], name=name)
        for each in found
        for group in each["apiGroups"]
        for resource in each["resources"]
        for name in each.get("resourceNames") or [None]
    }


EVERYWHERE = {
    rule("", "events", "create"),
    *(
        rule("admissionregistration.k8s.io", f"{kind.lower()}s", "get", "patch", name=REGISTRATION)
        for kind in KINDS
    ),
}
AT_HOME = {
    rule("", "secrets", "create"),
    rule("", "secrets", "get", "update", name=SECRET),
}


def test_the_account_may_do_what_it_needs_and_nothing_else(the_rig: Rig) -> None:
    assert beyond_anybody(the_rig.cluster, SYSTEM) == EVERYWHERE | AT_HOME
    assert beyond_anybody(the_rig.cluster, "default") == EVERYWHERE


# ── Events ────────────────────────────────────────────────────────────────────────────────────────


def events(cluster: Cluster, namespace: str) -> list[Json]:
    found: list[Json] = cluster.get("events", "-n", namespace)["items"]
    ours = ("InjectionRefused", "ChangeRefused")
    return [each for each in found if each["reason"] in ours]


@pytest.fixture
def quiet(empty: Rig, replica: Replica) -> Iterator[Cluster]:
    """Without any Event or pod in the replica's namespace, before and after."""
    command = ("delete", "events,deployments,pods", "--all", "-n", replica.namespace, "--force")
    empty.cluster.kubectl(*command)
    yield empty.cluster
    empty.cluster.kubectl(*command)


def test_an_event_about_a_pod(quiet: Cluster, replica: Replica) -> None:
    bad = pod_of(ONE, {"ports": []})
    for flags in (["--dry-run=server"], [], []):
        said = quiet.refused("create", "-f", "-", *flags, given=bad)
        assert "0 ports are called 'mcp'" in said
    [found] = wait_until(lambda: events(quiet, ONE), "an Event")
    assert found["involvedObject"]["kind"] == "Pod"
    assert found["involvedObject"]["name"] == ONE
    assert (found["type"], found["reason"]) == ("Warning", "InjectionRefused")
    assert "0 ports are called 'mcp'" in found["message"]
    shown = quiet.kubectl("get", "events", "-n", ONE)
    assert "InjectionRefused" in shown
    assert f"pod/{ONE}" in shown
    assert replica.metric('injector_events_total{result="sent"}') == 1
    assert replica.metric('injector_events_total{result="repeated"}') == 1
    refused = 'injector_refusals_total{operation="CREATE",owner="Pod",webhook="mutate"}'
    assert replica.metric(refused) >= 3


def test_an_event_about_a_workload(quiet: Cluster, replica: Replica) -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": pod_of(ONE, {"ports": []})["spec"]}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    metadata = {"name": "tickets", "namespace": ONE}
    quiet.create(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}
    )
    [found] = wait_until(lambda: events(quiet, ONE), "an Event")
    [owner] = quiet.get("replicasets", "-n", ONE)["items"]
    about = found["involvedObject"]
    assert (about["kind"], about["uid"]) == ("ReplicaSet", owner["metadata"]["uid"])
    described = quiet.kubectl("describe", "replicaset", owner["metadata"]["name"], "-n", ONE)
    assert "InjectionRefused" in described
    assert replica.metric('injector_events_total{result="sent"}') == 1


def test_an_event_about_a_change(quiet: Cluster, replica: Replica) -> None:
    made = quiet.create(pod_of(ONE))
    said = quiet.refused("set", "image", f"pod/{ONE}", "mcp-sidecar=evil:1", "-n", ONE)
    assert "denied the request" in said
    [found] = wait_until(lambda: events(quiet, ONE), "an Event")
    assert found["reason"] == "ChangeRefused"
    assert found["involvedObject"]["uid"] == made["metadata"]["uid"]
    assert replica.metric('injector_events_total{result="sent"}') == 1


def test_no_event_where_there_shall_be_none(empty: Rig) -> None:
    with empty.replica(events=False) as replica:
        empty.wait_asked(replica)
        empty.cluster.refused("create", "-f", "-", given=pod_of(ONE, {"ports": []}))
        assert replica.metric('injector_events_total{result="sent"}') == 0
