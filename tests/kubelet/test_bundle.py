"""On a real node: an OPA that fetches its policy, by the pod's network and with its own token."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.injector.bundles import Places
from sidecar.injector.injection import ADMIN_PORT
from tests.cluster.registered import ENABLED
from tests.kubelet.conftest import RESTRICTED, Pod, Rig, server
from tests.kubelet.node import ADDRESS
from tests.pods.bundles import ALGORITHM, Maker, Server
from tests.pods.network import Network
from tests.support.certificates import Authority
from tests.support.processes import STARTER, wait_until
from tests.support.reaching import call, got

pytestmark = pytest.mark.timeout(180)

DELETING = """\
package mcp.custom

allow contains {"rule": "this"} if input.target.name == "delete_ticket"
"""


@pytest.fixture(scope="module")
def maker(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("bundles"), rig.opa)


@pytest.fixture(scope="module")
def served(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server of bundles on the node, which is where everybody else is here; whom to believe."""
    folder, authority = tmp_path_factory.mktemp("tls"), Authority()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*authority.server(ADDRESS).saved(folder, "server"))
    found, here = Server(tls), Network()
    here.outside = Path("/proc/self/ns/net")
    found.put("mcp.tar.gz", maker.policy(STARTER)[1])
    found.put("revoked.tar.gz", maker.revoked({"principals": []}))
    found.start(here)
    try:
        yield found, authority.pem.decode()
    finally:
        found.stop()


@pytest.fixture(scope="module")
def pod(rig: Rig, maker: Maker, served: tuple[Server, str]) -> Iterator[Pod]:
    bundles, authority = served
    settings: dict[str, Any] = {
        "bundle": {
            "url": bundles.url, "resource": "mcp.tar.gz", "key": maker.public,
            "algorithm": ALGORITHM, "scope": "mcp", "polling": 1, "ca": "ours", "token": True,
        },
        "revocation": {"resource": "revoked.tar.gz", "scope": "revoked", "polling": 1},
    }  # fmt: skip
    with rig.namespace({**ENABLED, **RESTRICTED}, **settings) as namespace:
        ours = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"ca.crt": authority}}
        rig.cluster.create({**ours, "metadata": {"name": "ours", "namespace": namespace}})
        found = rig.deploy(namespace, server())
        found.wait_ready()
        yield found


def revision(host: str) -> Any:
    return json.loads(got(host, ADMIN_PORT, "/readyz"))["policy"]["revision"]


def test_a_signed_bundle_is_in_force_and_then_the_next_one(
    pod: Pod, maker: Maker, served: tuple[Server, str], tmp_path: Path
) -> None:
    host = pod.ip
    assert (call(host, "get_ticket", id=4711), call(host, "delete_ticket", id=4711)) == (0, -31403)
    (tmp_path / "custom.rego").write_text(DELETING, "utf-8")
    wanted, content = maker.policy(tmp_path)
    served[0].put("mcp.tar.gz", content)
    wait_until(lambda: revision(host) == wanted, "the next one is in force")
    assert (call(host, "get_ticket", id=4711), call(host, "delete_ticket", id=4711)) == (-31403, 0)


NOT_TAKEN = {
    "unsigned": {"roots": ["mcp"], "key": None, "scope": None},
    "another key": {"roots": ["mcp"], "key": "bad"},
    "another scope": {"roots": ["mcp"], "scope": "other"},
    "foreign roots": {"roots": ["mcp", "system"]},
}


@pytest.mark.parametrize("how", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_a_bundle_that_is_not_ours_to_take_changes_nothing(
    pod: Pod, maker: Maker, served: tuple[Server, str], how: Any
) -> None:
    host, before = pod.ip, revision(pod.ip)
    evil = 'package mcp.authz\n\ndecision := {"allow": true, "revision": "evil"}\n'
    served[0].put("mcp.tar.gz", maker.raw({"decision.rego": evil}, **how))
    wait_until(lambda: served[0].given["mcp.tar.gz"] >= 2, "OPA has refused it, and looks again")
    assert revision(host) == before
    assert call(host, "export_all") == -31403


def test_the_token_is_the_pods_own_and_for_the_server_of_bundles_alone(pod: Pod, rig: Rig) -> None:
    token_file = Places().token
    token = pod.exec("mcp-opa", "cat", token_file).stdout
    for audience, known in (("mcp-policy", True), ("https://kubernetes.default.svc", False)):
        review = rig.cluster.create(
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "metadata": {},
                "spec": {"token": token, "audiences": [audience]},
            }
        )
        assert review["status"].get("authenticated", False) is known
    for name in ("app", "mcp-sidecar"):
        assert pod.exec(name, "cat", token_file).returncode != 0
