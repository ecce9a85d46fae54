"""Mode `front` on a real node: pods as API server, webhook, kubelet and runc make them.

Others are clients on the node, and a pod next door.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.injector.injection import ADMIN_PORT, OPA_PORT
from tests.cluster.registered import ENABLED
from tests.kubelet.conftest import RESTRICTED, Pod, Rig, server
from tests.pods.asking import WRITES
from tests.support.processes import wait_until
from tests.support.reaching import PORT, asked, call, follow_the_starter

pytestmark = pytest.mark.timeout(180)  # a pod starts in seconds, on a busy machine in more

KINDS = pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
STRICT = {**ENABLED, **RESTRICTED}


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Pod]:
    """The pod of a Deployment, in a namespace with the strictest standard."""
    with rig.namespace(STRICT, native=request.param) as namespace:
        found = rig.deploy(namespace, server())
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def next_door(rig: Rig) -> Iterator[Pod]:
    """Another pod, of a namespace that nothing is injected into."""
    template = server()
    template["spec"]["containers"][0]["command"] = ["sleep", "infinity"]
    del template["spec"]["containers"][0]["readinessProbe"]
    with rig.namespace({}) as namespace:
        found = rig.deploy(namespace, template)
        found.wait_ready()
        yield found


# ── What policy allows, and nothing else ──────────────────────────────────────────────────────────


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    before = pod.done()
    follow_the_starter(pod.ip)
    assert pod.done()[len(before) :] == ["get_ticket"]


def test_containers_run_as_they_are_told(pod: Pod) -> None:
    """By runc: users, no capability, seccomp, and a root that can't be written to."""
    expected = {"mcp-opa": (20002, 20001), "mcp-sidecar": (20001, 20001), "app": (1001, 1001)}
    for name, ids in expected.items():
        lines = pod.exec(name, "cat", "/proc/1/status").stdout.splitlines()
        found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert (int(found["Uid"].split()[1]), int(found["Gid"].split()[1])) == ids
        assert [int(found[each], 16) for each in ("CapEff", "CapPrm", "CapBnd")] == [0, 0, 0]
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        written = pod.exec(name, "touch", "/tmp/x").returncode
        assert (written == 0) is (name == "app")


# ── Every path that `front` closes ────────────────────────────────────────────────────────────────


def test_nothing_else_listens_on_the_pods_address(pod: Pod) -> None:
    host, found = pod.ip, set()
    for port in range(1, 65536):
        with socket.socket() as client:
            client.settimeout(2)
            if client.connect_ex((host, port)) == 0:
                found.add(port)
    assert found == {PORT, ADMIN_PORT, OPA_PORT}


def test_the_servers_port_on_the_pods_address_is_the_sidecars(pod: Pod, next_door: Pod) -> None:
    inside = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/healthz').status)"
    assert pod.python("app", inside) == "200"
    assert asked(pod.ip, "GET", PORT, "/healthz") == 404
    assert next_door.python("app", reaching(pod.ip, [("GET", "/healthz", "")])) == "404"


def reaching(host: str, asked: list[tuple[str, str, str]], port: int = PORT) -> str:
    """A program that prints how each is answered."""
    return f"""
import http.client
for method, path, body in {asked!r}:
    connection = http.client.HTTPConnection({host!r}, {port}, timeout=5)
    connection.request(method, path, body)
    print(connection.getresponse().status)
"""


def test_opas_socket_is_not_there_for_the_server(pod: Pod) -> None:
    program = """
import os, socket
named = [line.split()[-1] for line in open("/proc/net/unix") if "opa" in line]
there = [p for p in named + ["/run/mcp-opa", "/run/mcp-opa/opa.sock"] if os.path.exists(p)]
for path in named:
    with socket.socket(socket.AF_UNIX) as s:
        if s.connect_ex(path.replace("@", chr(0))) == 0: there.append(path)
for each in filter(str.isdigit, os.listdir("/proc")):
    there += [each] if os.stat(f"/proc/{each}").st_uid != os.getuid() else []
print(there, len(named) > 0)
"""
    assert pod.python("app", program) == "[] True"


def test_opas_api_is_not_on_the_network(pod: Pod, next_door: Pod) -> None:
    host, refused = pod.ip, ["404"] * len(WRITES)
    assert next_door.python("app", reaching(host, WRITES, OPA_PORT)).split() == refused
    assert pod.python("app", reaching("127.0.0.1", WRITES, OPA_PORT)).split() == refused
    for method, path, body in WRITES:
        assert asked(host, method, OPA_PORT, path, body) == 404, (method, path)
    assert asked(host, "GET", OPA_PORT, "/health") == 200


def test_the_admin_port_does_nothing(pod: Pod, next_door: Pod) -> None:
    paths = ("/livez", "/readyz", "/metrics", "/app-health/app/readyz", "/tail", "/drain", "/")
    changing = [(m, p, "") for m in ("POST", "PUT", "DELETE", "PATCH") for p in paths]
    answers = next_door.python("app", reaching(pod.ip, changing, ADMIN_PORT)).split()
    assert set(answers) <= {"404", "405"}
    assert len(answers) == len(changing)


def test_the_sidecars_image_can_not_be_changed(pod: Pod, rig: Rig) -> None:
    words = ("set", "image", f"pod/{pod.name}", "-n", pod.namespace, "mcp-sidecar=localhost/app:1")
    assert "denied the request" in rig.cluster.refused(*words)
    assert pod.status("mcp-sidecar")["restartCount"] == 0


def test_what_it_does_not_close_is_port_forward(pod: Pod) -> None:
    """Whoever may do that is let by the cluster's own rules; mode `redirect` closes it."""
    with pod.forwarded(PORT) as port:
        assert asked("127.0.0.1", "GET", port, "/healthz") == 200


# ── Probes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_is_not_well_makes_the_pod_not_ready(pod: Pod) -> None:
    """By the kubelet's own probe, which goes to the sidecar and from there to the server."""
    sick = pod.volume("data") / "sick"
    sick.touch()
    try:
        wait_until(lambda: not pod.ready, "the pod is not ready")
        assert pod.status("mcp-sidecar")["ready"]
    finally:
        sick.unlink()
    pod.wait_ready()


# ── Servers that do not do as they are told ───────────────────────────────────────────────────────


@KINDS
def test_a_server_that_listens_everywhere_does_not_run(rig: Rig, native: bool) -> None:
    with rig.namespace(STRICT, native=native) as namespace:
        pod = rig.deploy(namespace, server("--everywhere"))
        said = "Address already in use"
        wait_until(lambda: said in pod.log("app", "--previous"), "the server has failed", 60)
        assert "listening" not in pod.log("app")
        assert pod.status("mcp-sidecar")["ready"]
        assert not pod.ready
        assert asked(pod.ip, "GET", PORT, "/healthz") == 404


@KINDS
def test_without_a_sidecar_the_pod_is_not_ready(rig: Rig, native: bool) -> None:
    with rig.namespace(STRICT, native=native, config="x: 1\n") as namespace:
        pod = rig.deploy(namespace, server("--everywhere"))
        wait_until(lambda: pod.failures("mcp-sidecar"), "the sidecar has failed", 60)
        assert pod.failures("mcp-sidecar") == {125}
        assert ("running" in pod.status("app")["state"]) is not native
        assert not pod.ready


# ── What it lives through ─────────────────────────────────────────────────────────────────────────


def test_an_edit_of_the_config_map_is_in_force(pod: Pod, rig: Rig, tmp_path: Path) -> None:
    """In place of the starter policy: nothing but `delete_ticket`."""
    (tmp_path / "custom.rego").write_text(
        "package mcp.custom\n\n"
        'allow contains {"rule": "this"} if input.target.name == "delete_ticket"\n',
        "utf-8",
    )
    changed = rig.policy(tmp_path)
    host = pod.ip
    rig.cluster.kubectl("apply", "-n", pod.namespace, "-f", "-", given=changed)
    wait_until(lambda: call(host, "delete_ticket", id=4711) == 0, "the edit is in force", 90)
    assert call(host, "get_ticket", id=4711) == -31403
    assert [pod.status(each)["restartCount"] for each in ("mcp-opa", "mcp-sidecar")] == [0, 0]
    assert pod.ready


@KINDS
def test_what_is_in_flight_is_finished_at_the_end(rig: Rig, native: bool) -> None:
    with rig.namespace(STRICT, native=native) as namespace:
        pod = rig.create(namespace, server(), finalizers=["example.com/looked-at"])
        pod.wait_ready()
        hold, codes, host = pod.volume("data") / "hold", list[int](), pod.ip
        hold.touch()
        client = threading.Thread(target=lambda: codes.append(call(host, "get_ticket", id=4711)))
        client.start()
        wait_until(lambda: pod.done() == ["get_ticket"], "the call is in flight")
        rig.cluster.kubectl("delete", "pod", pod.name, "-n", namespace, "--wait=false")
        wait_until(lambda: pod.get()["metadata"].get("deletionTimestamp"), "it is to end")
        hold.unlink()
        client.join()
        assert codes == [0]
        ended = wait_until(lambda: pod.ended("app", "mcp-sidecar", "mcp-opa"), "all of it has", 60)
        assert [each["exitCode"] for each in ended] == [0, 0, 0]
        times = [each["finishedAt"] for each in ended]
        assert times == sorted(times) or not native
        done = {"metadata": {"finalizers": None}}
        rig.cluster.kubectl(
            "patch", "pod", pod.name, "-n", namespace, "--type=merge", "-p", json.dumps(done)
        )
        wait_until(lambda: pod.gone, "the pod has ended")


def test_a_job_that_has_done_its_work_is_complete(rig: Rig) -> None:
    template = server(restartPolicy="Never")
    template["spec"]["containers"][0]["command"] = ["sh", "-c", "sleep 1"]
    with rig.namespace(STRICT) as namespace:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "once", "namespace": namespace},
            "spec": {"template": template},
        }
        rig.cluster.kubectl("apply", "-f", "-", given=job)
        words = ("wait", "--for=condition=Complete", "job/once", "-n", namespace, "--timeout=50s")
        rig.cluster.kubectl(*words)
        (made,) = rig.cluster.pods(namespace, "job-name=once")
        pod = Pod(rig, namespace, made["metadata"]["name"])
        assert pod.get()["status"]["phase"] == "Succeeded"
        assert [each["exitCode"] for each in pod.ended("app", "mcp-sidecar", "mcp-opa")] == [
            0,
            0,
            0,
        ]
