"""Mode `redirect` on a real node: the rules are made with what runc lets the first container do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sidecar.injector.injection import SIDECAR_PORT, Injection, Namespace
from sidecar.injector.plan import plan
from tests.cluster.registered import ENABLED
from tests.kubelet.conftest import Json, Pod, Rig, server
from tests.kubelet.images import SIDECAR
from tests.pods.test_redirect import BECOMING, BROKEN, CLOSED, HARMLESS, PROTOCOLS, healthz
from tests.support.pods import annotated
from tests.support.processes import wait_until
from tests.support.reaching import PORT, asked, follow_the_starter

pytestmark = pytest.mark.timeout(180)


def redirected() -> Json:
    """A pod whose server listens everywhere, and others in it, one of them root."""
    found = server("--everywhere")
    found["spec"]["containers"] += [
        {
            "name": name, "image": SIDECAR, "imagePullPolicy": "Never",  # which has nft
            "command": ["sleep", "infinity"],
            "securityContext": {**HARMLESS, "runAsUser": user, "runAsGroup": user},
        }
        for name, user in (("neighbour", 1002), ("root", 0))
    ]  # fmt: skip
    found["spec"]["terminationGracePeriodSeconds"] = 1  # `sleep` is not told twice
    return annotated(found, mode="redirect")


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Pod]:
    with rig.namespace(ENABLED, native=request.param) as namespace:
        found = rig.deploy(namespace, redirected())
        found.wait_ready()
        yield found


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    before = pod.done()
    follow_the_starter(pod.ip)
    assert pod.done()[len(before) :] == ["get_ticket"]


def test_outside_gets_the_sidecar(pod: Pod) -> None:
    host = pod.ip
    assert asked(host, "GET", PORT, "/healthz") == 404
    assert asked(host, "GET", SIDECAR_PORT, "/healthz") == 404


@pytest.mark.parametrize("name", ["app", "neighbour", "root"])
def test_nobody_in_the_pod_reaches_the_server(pod: Pod, name: str) -> None:
    for host in ("127.0.0.1", pod.ip, "0.0.0.0", "::ffff:127.0.0.1", "::1"):
        for protocol in PROTOCOLS.values():
            expected = "closed" if host in CLOSED else "404"
            assert pod.python(name, healthz(host, protocol)) == expected


def test_the_sidecar_reaches_it(pod: Pod) -> None:
    """Else the tests around this one would find nothing that can be reached."""
    for host in ("127.0.0.1", pod.ip, "::1"):
        assert pod.python("mcp-sidecar", healthz(host)) == "200"


def test_port_forward_gets_the_sidecar(pod: Pod) -> None:
    with pod.forwarded(PORT) as port:
        assert asked("127.0.0.1", "GET", port, "/healthz") == 404


@pytest.mark.parametrize("name", ["app", "neighbour", "root"])
def test_nobody_becomes_the_sidecars_user(pod: Pod, name: str) -> None:
    assert pod.python(name, BECOMING) == ""


@pytest.mark.parametrize("name", ["neighbour", "root"])
def test_the_rules_can_not_be_undone(pod: Pod, name: str) -> None:
    for line in ("flush ruleset", "delete table inet mcp_opa_sidecar", "list ruleset"):
        undone = pod.exec(name, "nft", line)
        assert undone.returncode != 0
        assert "Operation not permitted" in undone.stderr
    assert pod.python(name, healthz("127.0.0.1")) == "404"


@pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_proved_does_not_begin(rig: Rig, native: bool, broken: str) -> None:
    """A pod that the webhooks would not let by, where they are not asked."""
    change, code, said = BROKEN[broken]
    settings = Injection(image=SIDECAR, pull_policy="Never", config="config", native=native)
    with rig.namespace({}) as name:
        planned = plan(redirected(), Namespace(name, ENABLED), settings)
        change(planned)
        pod = rig.create(name, {**planned, "metadata": {}})
        wait_until(lambda: pod.failures("mcp-redirect"), "the first container has failed", 60)
        assert pod.failures("mcp-redirect") == {code}
        wait_until(lambda: said in pod.log("mcp-redirect"), "it says why")
        others = ("mcp-opa", "mcp-sidecar", "app", "neighbour", "root")
        assert not any(pod.status(each).get("started") for each in others)
        assert pod.get()["status"]["phase"] == "Pending"
