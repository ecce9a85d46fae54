"""Mode `client` in a pod that runs: an agent's calls go out by its sidecar, which asks first.

The server is in the namespace of everybody else, as a pod of its own would be.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.injector.injection import SIDECAR_PORT
from tests.pods.asking import python
from tests.pods.conftest import SERVER, Json, Rig
from tests.pods.network import OUTSIDE_IP, POD_IP
from tests.pods.runner import Pod
from tests.support.pods import annotated
from tests.support.processes import Process, done, environment, wait_until
from tests.support.reaching import connects

pytestmark = pytest.mark.timeout(180)

PORT = 8080
ACCOUNT = "system:serviceaccount:agents:support-bot"
GRANTS = {
    "agents": {"principals": {ACCOUNT: {"read": {"tools": ["search_tickets", "get_ticket"]}}}}
}
POLICY = {"mcp": {"default_issuer": "static", "grants": GRANTS}}


def agent_pod() -> Json:
    """A pod with an agent that knows two servers, one of which is not there."""
    env = [
        {"name": name, "value": f"http://{OUTSIDE_IP}:{port}/mcp"}
        for name, port in (("TICKETS_URL", PORT), ("GONE_URL", PORT + 1))
    ]
    command = ["sleep", "infinity"]
    agent: Json = {"name": "agent", "image": "app", "command": command, "env": env}
    found: Json = {
        "metadata": {"name": "bot", "namespace": "agents", "labels": {"app": "bot"}},
        "spec": {"containers": [agent], "serviceAccountName": "support-bot"},
    }
    return annotated(found, mode="client", servers="tickets=TICKETS_URL, gone=GONE_URL")


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def agent(
    request: pytest.FixtureRequest, rig: Rig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pod, Path]]:
    """The pod, and the log of the server that it has."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "data.yaml").write_text(yaml.safe_dump(POLICY), "utf-8")
    data = tmp_path_factory.mktemp("server")
    policy = rig.build(folder)["data"]
    with rig.running(agent_pod(), policy, config=None, native=request.param) as pod:
        command = [*SERVER[:-1], data, "--port", PORT, "--everywhere"]
        outside = ["nsenter", f"--net={pod.network.outside}"]
        with Process([*outside, *map(str, command)], env=environment()):
            wait_until(lambda: pod.network.from_outside(lambda: connects(OUTSIDE_IP, PORT)), "it")
            pod.wait_ready()
            yield pod, data / "log"


def call(pod: Pod, name: str, *, by: str = "TICKETS_URL", **arguments: Any) -> tuple[int, Any]:
    """What the agent gets, which knows no more than its variables."""
    found = pod["agent"].container
    assert found is not None
    program = [sys.executable, "-m", "tests.pods.agent", by, name, json.dumps(arguments)]
    ran = found.exec(program, 60)
    assert ran.returncode == 0, ran.stderr.decode()
    code, data = json.loads(ran.stdout)
    return code, data


def test_the_agent_gets_what_policy_allows_its_account(agent: tuple[Pod, Path]) -> None:
    pod, log = agent
    before = len(done(log))
    assert call(pod, "get_ticket", id=4711) == (0, None), pod.logs()
    code, data = call(pod, "delete_ticket", id=4711)
    assert (code, data["reasons"][0]["code"]) == (-31403, "not_granted")
    assert done(log)[before:] == ["get_ticket"]


def test_a_server_that_is_not_there_is_told_as_such(agent: tuple[Pod, Path]) -> None:
    assert call(agent[0], "get_ticket", by="GONE_URL", id=4711)[0] == -31502


def test_nobody_else_calls_in_its_name(agent: tuple[Pod, Path]) -> None:
    pod, _ = agent
    assert not pod.network.from_outside(lambda: connects(POD_IP, SIDECAR_PORT))


def test_what_it_does_not_close_is_another_way_out(agent: tuple[Pod, Path]) -> None:
    """Why agents' namespaces have a NetworkPolicy."""
    program = (
        f"import urllib.request as u; print(u.urlopen('http://{OUTSIDE_IP}:{PORT}/healthz').status)"
    )
    assert python(agent[0], "agent", program) == "200"


def test_without_opa_nothing_goes_out(agent: tuple[Pod, Path]) -> None:
    pod, log = agent
    before, opa = done(log), pod["mcp-opa"].container
    assert opa is not None
    opa.signal(signal.SIGSTOP)
    try:
        assert call(pod, "get_ticket", id=4711)[0] == -31503
    finally:
        opa.signal(signal.SIGCONT)
    assert done(log) == before
    pod.wait_ready()
