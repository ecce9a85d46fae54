"""Mode `redirect` in a pod that runs: nobody but the sidecar's user reaches the server.

The kernel's rules are real: they are made by the pod's first container in its network namespace.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError

from sidecar.injector.injection import SIDECAR_PORT
from tests.pods.asking import asked, call, follow_the_starter, log, python
from tests.pods.conftest import Json, Rig, server_pod
from tests.pods.network import POD_IP, POD_IP6, Network, within
from tests.pods.runner import Pod
from tests.support.client import LEGACY, over_http
from tests.support.pods import annotated, container
from tests.support.processes import done, sidecar, wait_until
from tests.support.reaching import PORT

pytestmark = pytest.mark.timeout(180)

HARMLESS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
ADDRESSES = ["127.0.0.1", "127.8.8.8", "0.0.0.0", POD_IP, "::ffff:127.0.0.1", POD_IP6, "::1", "::"]
CLOSED = {POD_IP6, "::1", "::"}
"""From within, rules lead to loopback, and of that the sidecar has IPv4's."""


def redirected(*arguments: str, **spec: Any) -> Json:
    """A pod whose server listens everywhere, as servers do unless they are told not to."""
    found = server_pod("--everywhere", *arguments, **spec)
    others = [
        {"name": "neighbour", "image": "app", "command": ["sleep", "infinity"],
         "securityContext": {**HARMLESS, "runAsUser": 1002, "runAsGroup": 1002}},
        {"name": "root", "image": "app", "command": ["sleep", "infinity"],
         "securityContext": {**HARMLESS, "runAsUser": 0, "runAsGroup": 0}},
    ]  # fmt: skip
    found["spec"]["containers"] += others
    container(found, "app")["securityContext"] = {**HARMLESS, "runAsUser": 1001}
    return annotated(found, mode="redirect")


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig, starter: Mapping[str, str]) -> Iterator[Pod]:
    both = (POD_IP, POD_IP6)
    with rig.running(redirected(), starter, native=request.param, addresses=both) as found:
        found.wait_ready()
        yield found


# ── What policy allows, and nothing else ──────────────────────────────────────────────────────────


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    follow_the_starter(pod)


# ── Every way to the server but the sidecar's ─────────────────────────────────────────────────────

# What the server says of itself at a path that the sidecar does not have, to who gets through.
HEALTHZ = """
import http.client, socket
host, protocol = {host!r}, {protocol}
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, socket.SOCK_STREAM, protocol) as s:
    s.settimeout(5)
    if s.connect_ex((host, {port})) != 0:
        print("closed")
        raise SystemExit
    connection = http.client.HTTPConnection("localhost")
    connection.sock = s
    connection.request("GET", "/healthz")
    print(connection.getresponse().status)
"""
PROTOCOLS = {"TCP": 0, "Multipath TCP": 262}


def healthz(host: str, protocol: int = 0) -> str:
    return HEALTHZ.format(host=host, port=PORT, protocol=protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("host", ADDRESSES)
@pytest.mark.parametrize("name", ["app", "neighbour", "root"])
def test_nobody_in_the_pod_reaches_it(pod: Pod, name: str, host: str, protocol: int) -> None:
    """Nor its own container, nor root without capabilities: all of them get the sidecar."""
    found = python(pod, name, healthz(host, protocol))
    assert found == ("closed" if host in CLOSED else "404")


def test_the_sidecar_reaches_it(pod: Pod) -> None:
    """Else the tests above would find nothing that can be reached."""
    for host in ADDRESSES:
        assert python(pod, "mcp-sidecar", healthz(host)) == "200"


def test_outside_gets_the_sidecar(pod: Pod) -> None:
    assert asked(pod, "GET", PORT, "/healthz") == 404
    assert asked(pod, "GET", SIDECAR_PORT, "/healthz") == 404
    assert call(pod, "get_ticket", host=POD_IP6, id=4711) == 0
    assert call(pod, "export_all", host=POD_IP6) == -31403


def test_port_forward_gets_the_sidecar(pod: Pod) -> None:
    """A kubelet dials the pod's loopback from the node: as root, with all that root may do."""

    def forwarded() -> int:
        ran = subprocess.run(
            [sys.executable, "-c", healthz("127.0.0.1")],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return int(ran.stdout)

    assert within(pod.network.pod, forwarded) == 404


def test_a_neighbour_gets_by_the_sidecar_what_policy_allows(pod: Pod) -> None:
    def inside() -> int:
        async def once() -> int:
            async with over_http(f"http://127.0.0.1:{PORT}/mcp", LEGACY) as client:
                await client.list_tools()
                try:
                    await client.call_tool("export_all", {})
                except MCPError as error:
                    return error.code
                return 0

        return asyncio.run(once())

    before = done(log(pod)).count("export_all")
    assert within(pod.network.pod, inside) == -31403
    assert done(log(pod)).count("export_all") == before


@pytest.mark.parametrize("name", ["app", "neighbour", "root"])
def test_the_rules_can_not_be_undone(pod: Pod, name: str) -> None:
    member = pod[name].container
    assert member is not None
    for line in ("flush ruleset", "delete table inet mcp_opa_sidecar", "list ruleset"):
        undone = member.exec(["/usr/sbin/nft", line], 10)
        assert undone.returncode != 0
        assert b"Operation not permitted" in undone.stderr
    assert python(pod, "neighbour", healthz("127.0.0.1")) == "404"


BECOMING = """
import os
tries = {
    "setuid": lambda: os.setuid(20001),
    "setreuid": lambda: os.setreuid(-1, 20001),
    "setresuid": lambda: os.setresuid(20001, 20001, 20001),
    "raw": lambda: __import__("socket").socket(17, 3, 768),
}
for name, tried in tries.items():
    try: tried()
    except PermissionError: continue
    print(name, os.getresuid())
"""


@pytest.mark.parametrize("name", ["app", "neighbour", "root"])
def test_nobody_becomes_the_sidecars_user(pod: Pod, name: str) -> None:
    assert python(pod, name, BECOMING) == ""


def escalating(planned: Json) -> None:
    del container(planned, "app")["securityContext"]["allowPrivilegeEscalation"]


@pytest.mark.parametrize(
    ("change", "user"), [(lambda _: None, b"1001"), (escalating, b"20001")], ids=["held", "let go"]
)
def test_nor_by_a_program_of_the_sidecars(
    rig: Rig, starter: Mapping[str, str], change: Callable[[Json], None], user: bytes
) -> None:
    """A file's mode makes its owner of anybody, without a capability, where `no_new_privs` is not
    set: why a pod that does not say `allowPrivilegeEscalation: false` is refused."""
    with rig.running(redirected(), starter, change=change) as pod:
        pod.wait_ready()
        file = pod.volumes["data"] / "who"
        file.write_bytes(Path("/usr/bin/id").read_bytes())
        os.chown(file, 20001, 20001)
        file.chmod(0o6755)
        member = pod["app"].container
        assert member is not None
        assert member.exec(["/data/who", "-u"], 10).stdout.strip() == user


# ── Without the rules nothing begins ──────────────────────────────────────────────────────────────


def without_privilege(planned: Json) -> None:
    del container(planned, "mcp-redirect")["securityContext"]["capabilities"]["add"]


def for_somebody_else(planned: Json) -> None:
    """The first container's own user is let through: its proof has to fail."""
    rules = container(planned, "mcp-redirect")
    rules["args"] = [
        "--except-uid=0" if each.startswith("--except-uid") else each for each in rules["args"]
    ]


def of_another_pod(planned: Json) -> None:
    rules = container(planned, "mcp-redirect")
    rules["args"] = [*rules["args"][:-1], "--address=198.51.100.7"]


BROKEN: dict[str, tuple[Callable[[Json], None], int, str]] = {
    "no privilege": (without_privilege, 125, "nft refuses the rules (CAP_NET_ADMIN is needed)"),
    "rules that do not hold": (
        for_somebody_else,
        126,
        f"what dials 127.0.0.1:{PORT} does not arrive at port {SIDECAR_PORT}",
    ),
    "an address of others": (of_another_pod, 126, "198.51.100.7 is no address of this pod"),
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_not_proved_does_not_begin(
    rig: Rig,
    starter: Mapping[str, str],
    native: bool,
    broken: tuple[Callable[[Json], None], int, str],
) -> None:
    change, code, said = broken
    with rig.running(redirected(), starter, change=change, native=native) as pod:
        wait_until(lambda: len(pod["mcp-redirect"].codes) >= 2, "it has failed twice")
        assert set(pod["mcp-redirect"].codes) == {code}
        assert said in pod.log("mcp-redirect")
        begun = [name for name, each in pod.members.items() if each.begun]
        assert begun == ["mcp-redirect"]


def test_without_nft_it_says_so() -> None:
    line = sidecar("redirect", "--port=8080", "--to=15801", "--except-uid=20001")
    ran = subprocess.run(
        line, env={"PATH": "/nonexistent"}, capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 125
    assert ran.stderr.startswith("mcp-sidecar: nft can not be run")
    assert len(ran.stderr.splitlines()) == 1


def test_made_again_they_are_the_same(nft_usr: Path) -> None:
    """A kubelet may run the first containers of a pod once more."""
    libraries = ":".join(map(str, nft_usr.glob("lib/*-linux-gnu")))
    env = {"PATH": f"{nft_usr}/sbin:/usr/bin:/bin", "LD_LIBRARY_PATH": libraries}
    line = sidecar("redirect", "--port=8080", "--to=15801", "--except-uid=20001")
    with Network() as network:

        def run(*command: str) -> str:
            into = ["nsenter", f"--net={network.pod}", *command]
            return subprocess.run(
                into, env=env, capture_output=True, text=True, timeout=30, check=True
            ).stdout

        listed = []
        for _ in range(2):
            said = run(*line)
            assert said == "port 8080 is redirected to 15801, but for user 20001\n"
            listed.append(run("nft", "list", "ruleset"))
    assert listed[0] == listed[1]
    assert listed[0].count("redirect to :15801") == 2
