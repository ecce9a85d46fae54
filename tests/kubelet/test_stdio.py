"""Mode `stdio` on a real node: the shim is the first process of the server's container there."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from sidecar.injector.injection import ADMIN_PORT, OPA_PORT
from tests.cluster.registered import ENABLED
from tests.kubelet.conftest import HARMLESS, RESTRICTED, Json, Pod, Rig, server
from tests.kubelet.images import SIDECAR
from tests.support.pods import annotated
from tests.support.processes import wait_until
from tests.support.reaching import PORT, asked, follow_the_starter

pytestmark = pytest.mark.timeout(180)

STRICT = {**ENABLED, **RESTRICTED}
DESK = ["python3", "-m", "tests.support.ticket_desk", "--log", "/data/log"]


def stdio(command: list[str]) -> Json:
    """A pod with a stdio server, and somebody else in it."""
    found = server()
    app = found["spec"]["containers"][0]
    for key in ("ports", "readinessProbe"):
        del app[key]
    app["command"] = command
    found["spec"]["containers"].append(
        {
            "name": "neighbour", "image": SIDECAR, "imagePullPolicy": "Never",
            "command": ["sleep", "infinity"],
            "securityContext": {**HARMLESS, "runAsUser": 1002, "runAsGroup": 1002},
        }
    )  # fmt: skip
    found["spec"]["terminationGracePeriodSeconds"] = 5  # `sleep` does not end by being told
    return annotated(found, mode="stdio", container="app", port=str(PORT))


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Pod]:
    with rig.namespace(STRICT, native=request.param) as namespace:
        found = rig.deploy(namespace, stdio(DESK))
        found.wait_ready()
        yield found


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    before = pod.done()
    follow_the_starter(pod.ip)
    assert pod.done()[len(before) :] == ["get_ticket"]


def test_there_is_no_port_but_the_sidecars(pod: Pod) -> None:
    host, found = pod.ip, set()
    for port in range(1, 65536):
        with socket.socket() as client:
            client.settimeout(2)
            if client.connect_ex((host, port)) == 0:
                found.add(port)
    assert found == {PORT, ADMIN_PORT, OPA_PORT}
    assert asked(host, "GET", PORT, "/healthz") == 404


def test_port_forward_finds_nobody(pod: Pod) -> None:
    with pod.forwarded(PORT) as port, pytest.raises((http.client.HTTPException, OSError)):
        asked("127.0.0.1", "GET", port, "/healthz")


def test_the_socket_is_not_there_for_others(pod: Pod) -> None:
    program = """
import os, socket
named = [line.split()[-1] for line in open("/proc/net/unix") if "mcp-stdio" in line]
print([p for p in [*named, "/run/mcp-stdio", "/mcp-shim"] if os.path.exists(p)], len(named) > 0)
"""
    assert pod.python("neighbour", program) == "[] True"


def test_the_shim_is_the_first_process_and_the_servers_own_user(pod: Pod) -> None:
    assert pod.exec("app", "cat", "/proc/1/cmdline").stdout.startswith("/mcp-shim/ld.so\0")
    status = pod.exec("app", "cat", "/proc/1/status").stdout
    assert "\nUid:\t1001\t" in status
    assert pod.exec("app", "sh", "-c", ": >>/mcp-shim/shim.py").returncode != 0


def test_a_server_that_does_not_run_is_seen(rig: Rig) -> None:
    with rig.namespace(STRICT) as namespace:
        pod = rig.deploy(namespace, stdio(["sh", "-c", "exit 3"]))
        wait_until(lambda: pod.failures("app"), "the server has ended", 60)
        assert pod.failures("app") == {3}
        assert not pod.ready
