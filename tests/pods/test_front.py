"""Mode `front` in a pod that runs: what it keeps out, what it does not, and what it lives through.

Clients are in a network namespace of their own, as other pods and the node are.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError

from sidecar.injector.injection import ADMIN_PORT, OPA_PORT
from tests.pods.asking import (
    URL,
    WRITES,
    asked,
    by_socket,
    call,
    follow_the_starter,
    log,
    python,
    readyz,
)
from tests.pods.conftest import Rig, server_pod
from tests.pods.network import OUTSIDE_IP, POD_IP, POD_IP6, within
from tests.pods.runner import Pod
from tests.support.client import LEGACY, over_http
from tests.support.processes import done, wait_until
from tests.support.reaching import PORT, connects

pytestmark = pytest.mark.timeout(180)  # a pod starts in seconds, on a busy machine in more

KINDS = pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig, starter: Mapping[str, str]) -> Iterator[Pod]:
    """A pod with a server that does as it is told, and somebody else in it."""
    with rig.running(server_pod(neighbour=True), starter, native=request.param) as found:
        found.wait_ready()
        yield found


# ── What policy allows, and nothing else ──────────────────────────────────────────────────────────


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    follow_the_starter(pod)


# ── Every path that `front` closes ────────────────────────────────────────────────────────────────


def test_nothing_else_listens_on_the_pods_address(pod: Pod) -> None:
    def listening() -> set[int]:
        found = set()
        for port in range(1, 65536):
            with socket.socket() as client:
                client.settimeout(2)
                if client.connect_ex((POD_IP, port)) == 0:
                    found.add(port)
        return found

    assert pod.network.from_outside(listening) == {PORT, ADMIN_PORT, OPA_PORT}


def test_the_servers_port_on_the_pods_address_is_the_sidecars(pod: Pod) -> None:
    inside = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/healthz').status)"
    assert python(pod, "app", inside) == "200"
    assert asked(pod, "GET", PORT, "/healthz") == 404


def test_loopback_of_the_pod_is_not_reached_from_outside(pod: Pod) -> None:
    """Neither by its name, nor by packets that are sent to the pod with that address on them."""
    outside = ["ip", "netns", "exec", pod.network.outside.name]
    assert not pod.network.from_outside(lambda: connects("127.0.0.1", PORT))
    link = subprocess.run(
        [*outside, "ip", "-json", "address"], check=True, capture_output=True, timeout=10
    )
    name = next(each["ifname"] for each in json.loads(link.stdout) if each["ifname"] != "lo")
    for words in (
        [
            "sh",
            "-c",
            "for each in /proc/sys/net/ipv4/conf/*/route_localnet; do echo 1 >$each; done",
        ],
        ["ip", "address", "delete", "127.0.0.1/8", "dev", "lo"],
        ["ip", "route", "add", "127.0.0.1/32", "via", POD_IP, "dev", name, "src", OUTSIDE_IP],
    ):
        subprocess.run([*outside, *words], check=True, timeout=10)
    try:
        assert not pod.network.from_outside(lambda: connects("127.0.0.1", PORT))
    finally:
        for words in (
            ["ip", "route", "delete", "127.0.0.1/32"],
            ["ip", "address", "add", "127.0.0.1/8", "dev", "lo"],
        ):
            subprocess.run([*outside, *words], check=True, timeout=10)


@pytest.mark.parametrize("name", ["app", "neighbour"])
def test_opas_socket_is_not_there_for_others(pod: Pod, name: str) -> None:
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
    assert python(pod, name, program).startswith("[]")


def test_opas_api_is_not_on_the_network(pod: Pod) -> None:
    for host in (POD_IP, "127.0.0.1"):
        program = f"""
import http.client
for method, path, body in {WRITES!r}:
    connection = http.client.HTTPConnection({host!r}, {OPA_PORT}, timeout=5)
    connection.request(method, path, body)
    print(connection.getresponse().status, end=" ")
"""
        assert set(python(pod, "neighbour", program).split()) == {"404"}
    for method, path, body in WRITES:
        assert asked(pod, method, OPA_PORT, path, body) == 404, (method, path)
    assert asked(pod, "GET", OPA_PORT, "/health") == 200


def test_the_admin_port_does_nothing(pod: Pod) -> None:
    paths = ("/livez", "/readyz", "/metrics", "/app-health/app/readyz", "/tail", "/drain", "/")
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in paths:
            assert asked(pod, method, ADMIN_PORT, path) in (404, 405), (method, path)
    for path in ("/tail", "/drain", "/control", "/", "/app-health/other/readyz"):
        assert asked(pod, "GET", ADMIN_PORT, path) == 404


def test_nobody_else_gets_the_sidecars_address(pod: Pod) -> None:
    program = f"""
import errno, socket
for host in ({POD_IP!r}, "0.0.0.0"):
    for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT]):
        with socket.socket() as s:
            for each in options: s.setsockopt(socket.SOL_SOCKET, each, 1)
            try: s.bind((host, {PORT})); s.listen(); print("bound", host, options)
            except OSError as error: assert error.errno == errno.EADDRINUSE, error
"""
    assert python(pod, "neighbour", program) == ""


def test_what_it_does_not_close_is_loopback_within_the_pod(pod: Pod) -> None:
    """Why a pod with several containers has to say that it accepts this."""
    program = """
import json, urllib.request as u
body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "export_all",
    "arguments": {}, "_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "x", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {}}}}
said = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream",
    "MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "export_all"}
print(u.urlopen(u.Request("http://127.0.0.1:8080/mcp", json.dumps(body).encode(), said)).status)
"""
    before = done(log(pod)).count("export_all")
    assert python(pod, "neighbour", program) == "200"
    assert done(log(pod)).count("export_all") == before + 1


def test_containers_run_as_they_are_told(pod: Pod) -> None:
    """The runner's own claim: users, capabilities, and a root that can't be written to."""
    expected = {"mcp-opa": (20002, 20001), "mcp-sidecar": (20001, 20001), "app": (1001, 1001)}
    for name, (user, group) in expected.items():
        container = pod[name].container
        assert container is not None
        lines = Path(f"/proc/{container.pid()}/status").read_text("utf-8").splitlines()
        found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert (found["Uid"].split()[1], found["Gid"].split()[1]) == (str(user), str(group))
        assert int(found["CapEff"], 16) == 0
        if name != "app":
            assert (int(found["CapBnd"], 16), found["NoNewPrivs"]) == (0, "1")
            assert container.exec(["touch", "/tmp/x"], 10).returncode != 0


# ── Probes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_is_not_well_makes_the_pod_not_ready(pod: Pod) -> None:
    sick = pod.volumes["data"] / "sick"
    sick.touch()
    try:
        wait_until(lambda: not pod.ready, "the pod is not ready")
        assert pod["mcp-sidecar"].ready
        path = "/app-health/app/readyz"
        assert asked(pod, "GET", ADMIN_PORT, path) == 503
    finally:
        sick.unlink()
    pod.wait_ready()


# ── OPA's second wall ─────────────────────────────────────────────────────────────────────────────

ADDED = {
    "a rule": "package system.authz\n\nallow := true\n",
    "a default": "package system.authz\n\ndefault allow := true\n",
}


@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)
def test_with_authorization_the_socket_takes_questions_only(
    rig: Rig, starter: Mapping[str, str], added: str
) -> None:
    """Also where a policy would open it: what the image brings can't be added to."""
    policy = {**starter, "evil.rego": added}
    with rig.running(server_pod(), policy, opa_authorization=True) as pod:
        pod.wait_ready()
        answers = by_socket(pod)
        assert len(answers) == len(WRITES)
        for path, code in answers:
            passes = path == "/v1/data/mcp/authz/decision"
            assert (code == "200") is passes, (path, code)
        assert call(pod, "get_ticket", id=4711) == 0


# ── Servers that do not do as they are told ───────────────────────────────────────────────────────


@KINDS
@pytest.mark.parametrize("arguments", [(), ("--share-port",)], ids=["", "reuseport"])
def test_a_server_that_listens_everywhere_does_not_run(
    rig: Rig, starter: Mapping[str, str], native: bool, arguments: tuple[str, ...]
) -> None:
    with rig.running(server_pod("--everywhere", *arguments), starter, native=native) as pod:
        wait_until(lambda: len(pod["app"].codes) >= 2, "the server has failed twice")
        assert "Address already in use" in pod.log("app")
        assert "listening" not in pod.log("app")
        assert pod["mcp-sidecar"].ready
        assert not pod.ready
        assert asked(pod, "GET", PORT, "/healthz") == 404


@KINDS
def test_without_a_sidecar_the_pod_is_not_ready(
    rig: Rig, starter: Mapping[str, str], native: bool
) -> None:
    """Native, nothing is started after it. Ordered, a kubelet goes on after a gate that fails: a
    server that does as it is told is not reached then, one that does not is, without a Service."""
    with rig.running(server_pod("--everywhere"), starter, native=native, config="x: 1\n") as pod:
        wait_until(lambda: len(pod["mcp-sidecar"].codes) >= 2, "the sidecar has failed twice")
        assert set(pod["mcp-sidecar"].codes) == {125}
        if native:
            assert not pod["app"].begun
        else:
            wait_until(lambda: "listening on ::" in pod.log("app"), "the server is there")
        reached = pod.network.from_outside(lambda: connects(POD_IP, PORT))
        assert (reached, pod.ready) == (not native, False)


# ── What it lives through ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def two(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two policies that allow `get_ticket` and nothing else.

    Each has a rule and data; those of one with those of the other are wrong about everything.
    """
    made = []
    for level in (0, 1):
        folder = tmp_path_factory.mktemp(f"policy-{level}")
        (folder / "data.yaml").write_text(f"mcp: {{level: {level}}}\n", "utf-8")
        (folder / "custom.rego").write_text(
            "package mcp.custom\n\n"
            'allow contains {"rule": "right"} if {\n\tinput.target.name == "get_ticket"\n'
            f"\tdata.mcp.level == {level}\n}}\n\n"
            'allow contains {"rule": "wrong"} if {\n\tinput.target.name == "delete_ticket"\n'
            f"\tdata.mcp.level != {level}\n}}\n",
            "utf-8",
        )
        made.append(rig.build(folder))
    return made


@pytest.fixture
def changing(rig: Rig, two: list[Any]) -> Iterator[tuple[Pod, Callable[[int], str]]]:
    """A pod whose policy can be changed to one of two; each gives its revision."""
    with rig.running(server_pod(), two[0]["data"]) as pod:
        pod.wait_ready()

        def change(level: int) -> str:
            pod.payloads["mcp-opa-sidecar-policy"].write(two[level]["data"])
            found: str = two[level]["metadata"]["annotations"]["mcp-opa-sidecar.io/revision"]
            return found

        yield pod, change


class Calling(threading.Thread):
    """A client that goes on calling, by one connection: what came of it, and by which revision."""

    def __init__(self, pod: Pod) -> None:
        super().__init__()
        self._pod, self._over = pod, threading.Event()
        self.wrong: list[Any] = []
        self.right = 0
        self.revision: str | None = None

    def run(self) -> None:
        within(self._pod.network.outside, lambda: asyncio.run(self._call()))

    def wait_for(self, revision: str) -> None:
        """Until a call was judged by this revision."""
        wait_until(lambda: self.revision == revision, "the edit is in force")

    def end(self) -> None:
        self._over.set()
        self.join()

    async def _call(self) -> None:
        async with over_http(URL, LEGACY) as client:
            while not self._over.is_set():
                for name, expected in (("get_ticket", 0), ("delete_ticket", -31403)):
                    code, data = 0, None
                    try:
                        await client.call_tool(name, {"id": 4711})
                    except MCPError as error:
                        code, data = error.code, error.data
                        self.revision = (data or {}).get("policy_revision")
                    if code == expected:
                        self.right += 1
                    else:
                        self.wrong.append((name, code, data))


def test_edits_of_the_config_map_are_in_force_and_never_by_halves(
    changing: tuple[Pod, Callable[[int], str]],
) -> None:
    pod, change = changing
    calling = Calling(pod)
    calling.start()
    try:
        for number in range(1, 21):
            wanted = change(number % 2)
            calling.wait_for(wanted)
    finally:
        calling.end()
    assert calling.wrong == []
    assert calling.right > 40
    wait_until(lambda: readyz(pod)["policy"]["revision"] == wanted, "the sidecar has seen it", 5)
    assert done(log(pod)).count("delete_ticket") == 0


def test_a_broken_edit_changes_nothing(changing: tuple[Pod, Callable[[int], str]]) -> None:
    pod, change = changing
    before, payload = readyz(pod)["policy"]["revision"], pod.payloads["mcp-opa-sidecar-policy"]
    good = {each.name: each.read_text("utf-8") for each in (payload.folder / "..data").iterdir()}
    payload.write({**good, "custom.rego": "package mcp.custom\n\nallow contains {"})
    calling = Calling(pod)
    calling.start()
    wait_until(lambda: calling.right > 100, "many calls were answered as before")
    calling.end()
    assert calling.wrong == []
    assert readyz(pod)["policy"]["revision"] == before
    wanted = change(1)
    wait_until(lambda: readyz(pod)["policy"]["revision"] == wanted, "the next good one is in force")


def test_without_opa_nothing_is_done(rig: Rig, starter: Mapping[str, str]) -> None:
    with rig.running(server_pod(), starter) as pod:
        pod.wait_ready()
        opa = pod["mcp-opa"].container
        assert opa is not None
        opa.signal(signal.SIGSTOP)
        assert call(pod, "get_ticket", id=4711) == -31503
        opa.signal(signal.SIGKILL)
        wait_until(lambda: len(pod["mcp-opa"].codes) == 1, "OPA is gone")
        assert done(log(pod)) == []
        pod.wait_ready()
        wait_until(lambda: call(pod, "get_ticket", id=4711) == 0, "OPA decides again")
        assert pod["mcp-sidecar"].codes == []


def test_without_the_sidecar_nobody_answers(rig: Rig, starter: Mapping[str, str]) -> None:
    with rig.running(server_pod(), starter) as pod:
        pod.wait_ready()
        guard = pod["mcp-sidecar"].container
        assert guard is not None
        guard.signal(signal.SIGKILL)
        wait_until(lambda: len(pod["mcp-sidecar"].codes) == 1, "the sidecar is gone")
        pod.wait_ready()
        assert call(pod, "delete_ticket", id=4711) == -31403
        assert asked(pod, "GET", PORT, "/healthz") == 404
        assert pod["app"].codes == []


@KINDS
def test_what_is_in_flight_is_finished_at_the_end(
    rig: Rig, starter: Mapping[str, str], native: bool
) -> None:
    with rig.running(server_pod(), starter, native=native) as pod:
        pod.wait_ready()
        hold, codes = pod.volumes["data"] / "hold", list[int]()
        hold.touch()
        client = threading.Thread(target=lambda: codes.append(call(pod, "get_ticket", id=4711)))
        client.start()
        wait_until(lambda: done(log(pod)) == ["get_ticket"], "the call is in flight")
        ender = threading.Thread(target=pod.delete)
        ender.start()
        if not native:
            wait_until(lambda: "finishing what is in flight" in pod.log("mcp-sidecar"), "stopping")
        hold.unlink()
        client.join()
        ender.join()
        assert codes == [0], pod.logs()
        assert {name: each.codes[-1] for name, each in pod.members.items()} == {
            "mcp-opa": 0, "mcp-sidecar": 0, "app": 0,
        }  # fmt: skip


@KINDS
def test_while_a_server_goes_on_its_sidecar_lets_others_in(
    rig: Rig, starter: Mapping[str, str], native: bool
) -> None:
    """At the end of a pod, while Services still send to it and its server takes its time."""
    found = server_pod()
    waits = "touch /data/ending; while test -e /data/stay; do sleep 0.1; done"
    hook = {"preStop": {"exec": {"command": ["sh", "-c", waits]}}}
    found["spec"]["containers"][0]["lifecycle"] = hook
    with rig.running(found, starter, native=native, pause=10) as pod:
        pod.wait_ready()
        data = pod.volumes["data"]
        (data / "stay").touch()
        ender = threading.Thread(target=pod.delete)
        ender.start()
        wait_until((data / "ending").exists, "the pod is to end")
        assert call(pod, "get_ticket", id=4711) == 0
        (data / "stay").unlink()
        ender.join()
        assert "finishing what is in flight" in pod.log("mcp-sidecar")
        assert {name: each.codes[-1] for name, each in pod.members.items()} == {
            "mcp-opa": 0, "mcp-sidecar": 0, "app": 0,
        }  # fmt: skip


# ── Addresses ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(
    not Path("/proc/net/if_inet6").exists(), reason="missing: IPv6 (a kernel that has it)"
)
@pytest.mark.parametrize(
    "addresses",
    [(POD_IP, POD_IP6), (POD_IP6, POD_IP), (POD_IP6,)],
    ids=["both", "IPv6 first", "IPv6"],
)
@KINDS
def test_each_address_of_the_pod_is_the_sidecars(
    rig: Rig, starter: Mapping[str, str], addresses: tuple[str, ...], native: bool
) -> None:
    with rig.running(server_pod(), starter, native=native, addresses=addresses) as pod:
        pod.wait_ready()
        for each in addresses:
            assert call(pod, "get_ticket", host=each, id=4711) == 0
            assert call(pod, "delete_ticket", host=each, id=4711) == -31403
            for port in (ADMIN_PORT, OPA_PORT):
                assert pod.network.from_outside(partial(connects, each, port))
        assert "delete_ticket" not in done(log(pod))


def test_a_pod_that_has_done_its_work_ends(rig: Rig, starter: Mapping[str, str]) -> None:
    found = server_pod(restartPolicy="Never")
    found["spec"]["containers"][0]["command"] = ["sh", "-c", "sleep 1"]
    with rig.running(found, starter) as pod:
        pod.wait_phase("Succeeded")
        wait_until(lambda: pod["mcp-opa"].given_up, "the sidecars have ended too")
        assert (pod["mcp-sidecar"].codes, pod["mcp-opa"].codes) == ([0], [0])
