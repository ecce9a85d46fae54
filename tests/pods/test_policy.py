"""The policy of a pod that runs: by ConfigMap with a stamp, and by signed bundles."""

from __future__ import annotations

import json
import shutil
import signal
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.injector.bundles import Bundle, Revocation
from sidecar.injector.injection import OPA_PORT
from sidecar.injector.opa import PERSISTED, POLICY
from tests.pods.asking import WRITES, admin, asked, by_socket, call, log, python, readyz
from tests.pods.bundles import ALGORITHM, Maker, Server
from tests.pods.conftest import Rig, server_pod
from tests.pods.network import OUTSIDE_IP, POD_IP
from tests.pods.runner import Pod
from tests.pods.volumes import token_for
from tests.support.certificates import Authority
from tests.support.processes import done, wait_until
from tests.support.reaching import connects

pytestmark = pytest.mark.timeout(180)

PORT = 8080
POLLING = 1
PROXY = """\
identity:
  proxy: {name: edge, peers: [192.0.2.0/24], id_header: x-user}
  types: [{type: human, source: proxy}]
"""


def policy(folder: Path, *tools: str) -> Path:
    """Everybody whom the proxy names here may do this."""
    grants = {"principals": {name: {"all": {"tools": list(tools)}} for name in ("ana", "bob")}}
    said = {"mcp": {"default_issuer": "edge", "grants": {"humans": grants}}}
    folder.mkdir(exist_ok=True)
    (folder / "data.yaml").write_text(yaml.safe_dump(said), "utf-8")
    return folder


def does(pod: Pod, name: str, who: str = "ana") -> int:
    return call(pod, name, headers={"x-user": who}, id=4711)


@pytest.fixture(scope="module")
def maker(rig: Rig, opa_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("bundles"), opa_bin)


@pytest.fixture(scope="module")
def reading(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    return maker.policy(policy(tmp_path_factory.mktemp("reading"), "get_ticket"))


@pytest.fixture(scope="module")
def deleting(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    folder = tmp_path_factory.mktemp("deleting")
    return maker.policy(policy(folder, "get_ticket", "delete_ticket"))


@contextmanager
def fetching(
    rig: Rig, maker: Maker, server: Server, more: Mapping[str, Any] | None = None, **injection: Any
) -> Iterator[Pod]:
    """A pod that has its policy of a server, which may be there or not."""
    bundle = Bundle(
        url=server.url, resource="mcp.tar.gz", key=maker.public, algorithm=ALGORITHM,
        scope="mcp", polling=POLLING, **(more or {}),
    )  # fmt: skip
    told = {"revocation": Revocation("revoked.tar.gz", "revoked", POLLING), **injection}
    try:
        with rig.running(server_pod(), {}, config=PROXY, bundle=bundle, **told) as pod:
            yield pod
    finally:
        server.stop()


@pytest.fixture
def server(maker: Maker, reading: tuple[str, bytes]) -> Server:
    found = Server()
    found.put("mcp.tar.gz", reading[1])
    found.put("revoked.tar.gz", maker.revoked({"principals": []}))
    return found


def revision(pod: Pod) -> Any:
    return readyz(pod)["policy"]["revision"]


# ── Signed bundles ────────────────────────────────────────────────────────────────────────────────


NATIVE_OR_NOT = pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])


@NATIVE_OR_NOT
def test_a_signed_bundle_is_in_force_and_then_the_next_one(
    rig: Rig, maker: Maker, server: Server, reading: Any, deleting: Any, *, native: bool
) -> None:
    with fetching(rig, maker, server, native=native) as pod:
        server.start(pod.network)
        pod.wait_ready()
        assert revision(pod) == reading[0]
        assert (does(pod, "get_ticket"), does(pod, "delete_ticket")) == (0, -31403)
        server.put("mcp.tar.gz", deleting[1])
        wait_until(lambda: revision(pod) == deleting[0], "the next one is in force", 10)
        assert does(pod, "delete_ticket") == 0
        assert pod.ready


@pytest.fixture(scope="module")
def guarded(
    rig: Rig, maker: Maker, reading: tuple[str, bytes]
) -> Iterator[tuple[Pod, Server, bytes]]:
    """A pod with a good bundle, whose OPA asks `system.authz` about each request."""
    server = Server()
    server.put("mcp.tar.gz", reading[1])
    server.put("revoked.tar.gz", maker.revoked({"principals": []}))
    with fetching(rig, maker, server, opa_authorization=True) as pod:
        server.start(pod.network)
        pod.wait_ready()
        yield pod, server, reading[1]


EVIL = {
    "decision.rego": 'package mcp.authz\n\ndecision := {"allow": true, "revision": "evil"}\n',
    "authz.rego": "package system.authz\n\nallow := true\n",
}
NOBODY = {"none.rego": "package mcp_revoked\n\nprincipals := {}\n"}
MCP = {"decision.rego": EVIL["decision.rego"]}
NOT_TAKEN: Mapping[str, tuple[Any, str]] = {
    "unsigned": ({"files": MCP, "roots": ["mcp"], "key": None, "scope": None}, "signatures"),
    "another key": ({"files": MCP, "roots": ["mcp"], "key": "bad"}, "invalid ECDSA signature"),
    "another scope": ({"files": MCP, "roots": ["mcp"], "scope": "other"}, "scope mismatch"),
    "no scope": ({"files": MCP, "roots": ["mcp"], "scope": None}, "scope mismatch"),
    "all roots": ({"files": EVIL, "roots": [""]}, "overlap"),
    "no roots": ({"files": EVIL, "roots": None}, "overlap"),
    "system": ({"files": EVIL, "roots": ["mcp", "system"]}, "root system is in multiple bundles"),
    "a part of it": ({"files": EVIL, "roots": ["mcp", "system/authz"]}, "system/authz"),
    "what is revoked": (
        {"files": {**MCP, **NOBODY}, "roots": ["mcp", "mcp_revoked"]},
        "root mcp_revoked is in multiple bundles",
    ),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_a_bundle_that_is_not_ours_to_take_changes_nothing(
    guarded: tuple[Pod, Server, bytes], maker: Maker, reading: tuple[str, bytes], case: str
) -> None:
    pod, server, good = guarded
    said, why = NOT_TAKEN[case]
    before = len(pod.log("mcp-opa"))
    server.put("mcp.tar.gz", maker.raw(**said))
    try:
        wait_until(lambda: server.given["mcp.tar.gz"] >= 2, "OPA has refused it, and looks again")
        assert why in pod.log("mcp-opa")[before:]
        assert revision(pod) == reading[0]
        assert (does(pod, "get_ticket"), does(pod, "delete_ticket")) == (0, -31403)
        assert {path for path, status in by_socket(pod) if status == "200"} == {
            "/v1/data/mcp/authz/decision"
        }
        assert pod.ready
    finally:
        server.put("mcp.tar.gz", good)


def test_what_opa_boots_with_is_nobodys_to_take_also_where_nothing_else_stands_beside_it(
    rig: Rig, maker: Maker, server: Server, reading: tuple[str, bytes]
) -> None:
    with fetching(rig, maker, server, revocation=None, opa_authorization=True) as pod:
        server.start(pod.network)
        pod.wait_ready()
        server.put("mcp.tar.gz", maker.raw(EVIL, roots=[""]))
        wait_until(lambda: server.given["mcp.tar.gz"] >= 2, "OPA has refused it")
        assert revision(pod) == reading[0]
        assert does(pod, "delete_ticket") == -31403
        assert dict(by_socket(pod))["/v1/policies/evil"] == "401"


@pytest.mark.parametrize("roots", [[""], ["mcp"], ["mcp", "mcp_revoked"], ["system"]], ids=str)
def test_what_is_revoked_brings_no_policy(
    guarded: tuple[Pod, Server, bytes], maker: Maker, reading: tuple[str, bytes], roots: list[str]
) -> None:
    """Though it is signed with the same key, and for its own scope."""
    pod, server, _ = guarded
    files = {"system": {"authz.rego": EVIL["authz.rego"]}, "": EVIL}.get(roots[0], MCP)
    server.put("revoked.tar.gz", maker.raw(files, roots=roots, scope="revoked"))
    try:
        wait_until(lambda: server.given["revoked.tar.gz"] >= 2, "OPA has refused it")
        assert revision(pod) == reading[0]
        assert (does(pod, "get_ticket"), does(pod, "delete_ticket")) == (0, -31403)
        assert dict(by_socket(pod))["/v1/policies/evil"] == "401"
    finally:
        server.put("revoked.tar.gz", maker.revoked({"principals": []}))


def test_opas_api_can_not_be_written_from_the_server(guarded: tuple[Pod, Server, bytes]) -> None:
    pod, _, _ = guarded
    program = f"""
import http.client, os
print([p for p in ("/run/mcp-opa", "/var/lib/mcp-opa") if os.path.exists(p)])
for method, path, body in {WRITES!r}:
    connection = http.client.HTTPConnection("127.0.0.1", {OPA_PORT}, timeout=5)
    connection.request(method, path, body)
    print(connection.getresponse().status)
"""
    there, *answers = python(pod, "app", program).splitlines()
    assert (there, set(answers)) == ("[]", {"401", "404"})
    outside = {asked(pod, method, OPA_PORT, path, body) for method, path, body in WRITES}
    assert outside == {401, 404}


def test_a_server_of_bundles_that_is_down_is_survived(
    rig: Rig, maker: Maker, server: Server, reading: tuple[str, bytes]
) -> None:
    """With what was kept; without it nothing is decided, until the server is there again."""
    with fetching(rig, maker, server) as pod:
        server.start(pod.network)
        pod.wait_ready()
        server.stop()
        restart(pod, 1)
        pod.wait_ready()
        wait_until(lambda: does(pod, "get_ticket") == 0, "OPA decides again")
        assert revision(pod) == reading[0]
        for each in pod.volumes[PERSISTED].iterdir():
            shutil.rmtree(each)
        restart(pod, 2)
        there = partial(pod.network.from_outside, lambda: connects(POD_IP, OPA_PORT))
        wait_until(there, "OPA is there")
        before = len(done(log(pod)))
        assert (does(pod, "get_ticket"), does(pod, "delete_ticket")) == (-31503, -31503)
        assert (pod.ready, len(done(log(pod)))) == (False, before)
        server.start(pod.network)
        pod.wait_ready()
        assert does(pod, "get_ticket") == 0


def restart(pod: Pod, number: int) -> None:
    """Kill OPA for the so-and-so-manieth time."""
    opa = pod["mcp-opa"].container
    assert opa is not None
    opa.signal(signal.SIGKILL)
    wait_until(lambda: len(pod["mcp-opa"].codes) == number, "OPA is gone")


def test_the_server_may_ask_for_a_token_and_have_a_certificate_of_its_own(
    rig: Rig, maker: Maker, server: Server, tmp_path: Path
) -> None:
    authority = Authority()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*authority.server(OUTSIDE_IP).saved(tmp_path, "server"))
    guarded = Server(tls, f"Bearer {token_for('mcp-policy')}")
    guarded.bundles = server.bundles
    maps = {"ours": {"ca.crt": authority.pem.decode()}}
    with fetching(rig, maker, guarded, {"ca": "ours", "token": True}, maps=maps) as pod:
        guarded.start(pod.network)
        pod.wait_ready()
        assert does(pod, "get_ticket") == 0
        assert guarded.missed.total() == 0


@NATIVE_OR_NOT
@pytest.mark.parametrize("missing", ["mcp.tar.gz", "revoked.tar.gz"])
def test_before_the_first_bundles_nobody_is_let_in(
    rig: Rig, maker: Maker, server: Server, *, missing: str, native: bool
) -> None:
    """Neither without a policy, nor without what is revoked."""
    content = server.bundles.pop(missing)
    with fetching(rig, maker, server, native=native) as pod:
        server.start(pod.network)
        other = next(name for name in server.bundles if name != missing)
        wait_until(lambda: server.given[other] == 1, "OPA has the other one")
        wait_until(lambda: server.missed[missing] >= 2, "OPA has asked for the missing one")
        assert not pod["app"].begun
        assert not pod.network.from_outside(lambda: connects(POD_IP, PORT))
        server.put(missing, content)
        pod.wait_ready()
        assert does(pod, "get_ticket") == 0


# ── What is revoked ───────────────────────────────────────────────────────────────────────────────


def test_who_is_revoked_is_out_within_seconds_and_others_go_on(
    rig: Rig, maker: Maker, server: Server
) -> None:
    with fetching(rig, maker, server) as pod:
        server.start(pod.network)
        pod.wait_ready()
        assert (does(pod, "get_ticket", "ana"), does(pod, "get_ticket", "bob")) == (0, 0)
        server.put("revoked.tar.gz", maker.revoked({"principals": ["edge|ana"]}))
        began = time.monotonic()
        wait_until(lambda: does(pod, "get_ticket", "ana") == -31403, "ana is out", 15)
        assert time.monotonic() - began < POLLING + 5
        assert does(pod, "get_ticket", "bob") == 0
        server.put("revoked.tar.gz", maker.revoked({"principals": ["edge|bob"]}))
        wait_until(lambda: does(pod, "get_ticket", "bob") == -31403, "bob is out", 15)
        assert does(pod, "get_ticket", "ana") == 0


# ── The stamp of a ConfigMap ──────────────────────────────────────────────────────────────────────


def lagging(pod: Pod) -> bool:
    return "\nauthz_policy_lagging 1" in admin(pod, "/metrics")


def test_a_stamped_revision_that_is_not_served_makes_the_pod_not_ready(
    rig: Rig, tmp_path: Path
) -> None:
    good = rig.build(policy(tmp_path / "good", "get_ticket"))
    next_one = rig.build(policy(tmp_path / "next", "get_ticket", "delete_ticket"))
    first, second = (
        each["metadata"]["annotations"]["mcp-opa-sidecar.io/revision"] for each in (good, next_one)
    )
    with rig.running(server_pod(), good["data"], config=PROXY) as pod:
        pod.wait_ready()
        stamped = {"revision": first, "stamped": first}
        wait_until(lambda: readyz(pod)["policy"] == stamped, "served as stamped")
        assert not lagging(pod)
        # One that is there already: a new file comes later than the rest of an edit.
        module = next(each for each in next_one["data"] if each.endswith(".rego"))
        pod.payloads[POLICY].write({**next_one["data"], module: "package mcp.authz\n\nallow {"})
        wait_until(lambda: not pod.ready, "the pod is not ready")
        assert readyz(pod)["policy"] == {"revision": first, "stamped": second}
        assert lagging(pod)
        assert (does(pod, "get_ticket"), does(pod, "delete_ticket")) == (0, -31403)
        pod.payloads[POLICY].write(next_one["data"])
        pod.wait_ready()
        assert readyz(pod)["policy"] == {"revision": second, "stamped": second}
        assert (does(pod, "delete_ticket"), lagging(pod)) == (0, False)


def test_what_is_revoked_may_be_a_key_of_the_config_map(rig: Rig, tmp_path: Path) -> None:
    """As fast as a kubelet brings it; the stamp is the policy's, and stays."""
    built = rig.build(policy(tmp_path / "policy", "get_ticket"))
    with rig.running(server_pod(), built["data"], config=PROXY) as pod:
        pod.wait_ready()
        assert does(pod, "get_ticket", "ana") == 0
        revoked = json.dumps({"mcp_revoked": {"principals": {"edge|ana": True}}})
        pod.payloads[POLICY].write({**built["data"], "revoked.json": revoked})
        wait_until(lambda: does(pod, "get_ticket", "ana") == -31403, "ana is out", 10)
        assert does(pod, "get_ticket", "bob") == 0
        said = readyz(pod)["policy"]
        assert said["revision"] == said["stamped"]
