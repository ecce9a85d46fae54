"""Mode `stdio` in a pod that runs: nobody reaches the server but through the sidecar.

The shim is the bundle that the pod's first container writes, in the server's container, as its
first process.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from sidecar.injector.injection import ADMIN_PORT, OPA_PORT
from tests.pods.asking import URL, asked, call, follow_the_starter, log, python, readyz
from tests.pods.conftest import Json, Rig
from tests.pods.network import POD_IP
from tests.pods.runner import Pod
from tests.support.client import LEGACY, over_http, text_of
from tests.support.pods import annotated
from tests.support.processes import done, wait_until
from tests.support.reaching import PORT, connects

pytestmark = pytest.mark.timeout(180)

DESK = [sys.executable, "-m", "tests.support.ticket_desk", "--log", "/data/log"]
KINDS = pytest.mark.parametrize("native", [True, False], ids=["native", "ordered"])
SOCKET = "/run/mcp-stdio/app.sock"


def stdio_pod(command: list[str] | None = None, *, neighbour: bool = False) -> Json:
    """A pod with one stdio server, and maybe somebody else in it."""
    app: Json = {
        "name": "app", "image": "app", "command": command or DESK,
        "args": [] if command else ["--hold", "/data/hold"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }  # fmt: skip
    other: Json = {
        "name": "neighbour", "image": "app", "command": ["sleep", "infinity"],
        "securityContext": {"runAsUser": 1002, "runAsGroup": 1002},
    }  # fmt: skip
    found: Json = {
        "metadata": {"name": "tickets", "namespace": "support"},
        "spec": {
            "containers": [app, *([other] if neighbour else [])],
            "volumes": [{"name": "data", "emptyDir": {}}],
        },
    }
    return annotated(found, mode="stdio", container="app", port=str(PORT))


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig, starter: Mapping[str, str]) -> Iterator[Pod]:
    with rig.running(stdio_pod(neighbour=True), starter, native=request.param) as found:
        found.wait_ready()
        yield found


def pid_of(pod: Pod, name: str) -> int:
    container = pod[name].container
    assert container is not None
    return container.pid()


def as_user(pod: Pod, user: int, program: str) -> str:
    """What a program prints that a user of the server's container runs; only a node can do this."""
    inside = ["--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd"]
    done = subprocess.run(
        ["nsenter", f"--target={pid_of(pod, 'app')}", *inside, "setpriv", f"--reuid={user}",
         "--clear-groups", "--", "/usr/bin/env", "-i", sys.executable, "-I", "-S", "-c", program],
        check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return done.stdout.strip()


# ── What policy allows, and nothing else ──────────────────────────────────────────────────────────


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    follow_the_starter(pod)


# ── Every way to the server but the sidecar's ─────────────────────────────────────────────────────


def test_there_is_no_port_but_the_sidecars(pod: Pod) -> None:
    """Nor is there one on loopback, for others of the pod or `kubectl port-forward`."""
    ours = [PORT, ADMIN_PORT, OPA_PORT]
    outside = pod.network.from_outside(
        lambda: [each for each in range(1, 65536) if connects(POD_IP, each)]
    )
    assert outside == ours
    program = """
lines = [each.split() for kind in ("tcp", "tcp6") for each in open(f"/proc/net/{kind}")][1:]
print(sorted({int(each[1].split(":")[1], 16) for each in lines if each[3] == "0A"}))
"""
    assert python(pod, "neighbour", program) == str(ours)
    dials = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {PORT})) != 0)"
    assert python(pod, "neighbour", dials) == "True"


def test_the_socket_is_not_there_for_others(pod: Pod) -> None:
    """Nor are the server's processes, whose stdin one might write to."""
    program = f"""
import os, socket
named = [line.split()[-1] for line in open("/proc/net/unix") if "mcp-stdio" in line]
there = [p for p in named + ["/run/mcp-stdio", {SOCKET!r}, "/mcp-shim"] if os.path.exists(p)]
for path in named:
    for each in (path, chr(0) + path):
        with socket.socket(socket.AF_UNIX) as s:
            if s.connect_ex(each) == 0: there.append(each)
for each in filter(str.isdigit, os.listdir("/proc")):
    there += [each] if os.stat(f"/proc/{{each}}").st_uid != os.getuid() else []
print(there, len(named) > 0)
"""
    assert python(pod, "neighbour", program) == "[] True"


CONNECT = f"""
import socket
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
client.connect({SOCKET!r})
try:
    client.sendall(b'{{"jsonrpc": "2.0", "id": 1, "method": "ping"}}\\n')
    print(client.recv(1000).decode().strip())
except ConnectionError:
    print()
"""


@pytest.mark.parametrize("user", [0, 1001, 1002, 20002])
def test_who_is_not_the_sidecar_is_refused_even_in_the_servers_container(
    pod: Pod, user: int
) -> None:
    assert as_user(pod, user, CONNECT) == ""
    wait_until(lambda: f"refused a connection of uid {user}\n" in pod.log("app"), "it is said")


def test_it_is_the_sidecars_user_that_is_served(pod: Pod) -> None:
    answer = json.loads(as_user(pod, 20001, CONNECT))
    assert (answer["id"], answer["result"]) == (1, {})


def test_the_shim_can_not_be_written_to(pod: Pod) -> None:
    program = """
import os
for path in ("/mcp-shim/shim.py", "/mcp-shim/lib/libc.so.6", "/mcp-shim/ld.so"):
    try: open(path, "ab")
    except OSError: pass
    else: print(path)
"""
    for user in (0, 1001, 20001):
        assert as_user(pod, user, program) == ""


@pytest.mark.parametrize("name", ["app", "neighbour"])
def test_opas_socket_is_not_there_for_others(pod: Pod, name: str) -> None:
    program = """
import os, socket
named = [line.split()[-1] for line in open("/proc/net/unix") if "opa.sock" in line]
print([each for each in [*named, "/run/mcp-opa"] if os.path.exists(each)], len(named) > 0)
"""
    assert python(pod, name, program) == "[] True"


def test_the_sidecar_follows_no_link_of_the_servers_to_sockets_of_its_own(
    rig: Rig, starter: Mapping[str, str]
) -> None:
    with rig.running(stdio_pod(), starter) as pod:
        pod.wait_ready()
        path = pod.volumes["mcp-opa-sidecar-stdio"] / "app.sock"
        path.unlink()
        path.symlink_to("/run/mcp-opa/opa.sock")
        wait_until(lambda: not pod.ready, "the pod is not ready")
        assert readyz(pod)["servers"]["missing"] == {"app": f"{SOCKET}: not a socket"}


# ── The shim, as the first process of a container ─────────────────────────────────────────────────


def test_it_is_the_first_process_and_small(pod: Pod) -> None:
    process = psutil.Process(pid_of(pod, "app"))
    assert process.cmdline()[:4] == [
        "/mcp-shim/ld.so", "--library-path", "/mcp-shim/lib", "/mcp-shim/bin/python3"
    ]  # fmt: skip
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
        if ":\t" in line
    )
    assert status["NSpid"].split()[-1] == "1"
    assert status["Uid"].split()[1] == "1001"
    memory = process.memory_info().rss / 2**20
    print(f"{memory:.1f} MiB")
    assert memory < 24


def test_it_waits_for_orphans(pod: Pod) -> None:
    """The first process of a container inherits them, also those of `kubectl exec`."""
    app = pod["app"].container
    assert app is not None
    done = app.exec(["sh", "-c", "sleep 0.1 & echo $!"], 10)
    assert int(done.stdout) > 1
    shim = psutil.Process(app.pid())

    def states() -> set[str]:
        return {each.status() for each in shim.children()}

    wait_until(lambda: not any(e.name() == "sleep" for e in shim.children()), "it is gone")
    assert psutil.STATUS_ZOMBIE not in states()


def test_the_server_sees_nothing_of_it(pod: Pod) -> None:
    shim = psutil.Process(pid_of(pod, "app"))
    server = wait_until(lambda: next(iter(shim.children()), None), "a server waits")
    assert server is not None
    assert server.cmdline()[1:3] == ["-m", "tests.support.ticket_desk"]
    maps = Path(f"/proc/{server.pid}/maps").read_text("utf-8")
    assert "/mcp-shim/" not in maps
    environ = Path(f"/proc/{server.pid}/environ").read_text("utf-8")
    assert environ == Path(f"/proc/{shim.pid}/environ").read_text("utf-8")
    files = {each.name for each in Path(f"/proc/{server.pid}/fd").iterdir()}
    links = {name: str(Path(f"/proc/{server.pid}/fd/{name}").readlink()) for name in files}
    assert not [name for name, link in links.items() if "socket" in link and name in "012"]


# ── Its life ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["false"], 1, "the server has ended with 1 before anybody came"),
        (["true"], 0, "the server has ended with 0 before anybody came"),
        (["no-such-server"], 127, "'no-such-server' can not be started: No such file"),
        (["/etc"], 126, "'/etc' can not be started: Permission denied"),
    ],
    ids=["fails", "ends", "not there", "no program"],
)
def test_a_server_that_does_not_run_is_seen(
    rig: Rig, starter: Mapping[str, str], command: list[str], code: int, said: str
) -> None:
    with rig.running(stdio_pod(command), starter) as pod:
        wait_until(lambda: len(pod["app"].codes) >= 2, "the server has ended twice")
        assert set(pod["app"].codes) == {code}
        assert said in pod.log("app")
        assert not pod.ready
        assert pod["mcp-sidecar"].codes == []


def test_a_server_that_dies_takes_its_session_along_and_nothing_else(
    rig: Rig, starter: Mapping[str, str]
) -> None:
    with rig.running(stdio_pod(), starter) as pod:
        pod.wait_ready()
        app = pod["app"].container
        assert app is not None

        async def told_twice() -> list[bool]:
            async with over_http(URL, LEGACY) as one, over_http(URL, LEGACY) as other:
                await one.call_tool("get_ticket", {"id": 4711})
                first = json.loads(log(pod).read_text("utf-8").splitlines()[-1])["pid"]
                app.exec(["kill", "-9", str(first)], 10)
                again = await other.call_tool("get_ticket", {"id": 4711})
                return ["4711" in text_of(again)]

        assert pod.network.from_outside(lambda: asyncio.run(told_twice())) == [True]
        assert call(pod, "get_ticket", id=4711) == 0
        assert pod["app"].codes == []
        assert pod.ready


def test_without_its_container_the_pod_is_not_ready_and_then_again(
    rig: Rig, starter: Mapping[str, str]
) -> None:
    with rig.running(stdio_pod(), starter) as pod:
        pod.wait_ready()
        app = pod["app"].container
        assert app is not None
        app.kill()
        wait_until(lambda: len(pod["app"].codes) == 1, "it has ended")
        pod.wait_ready()
        assert call(pod, "get_ticket", id=4711) == 0
        assert asked(pod, "GET", ADMIN_PORT, "/readyz") == 200


@KINDS
def test_what_is_in_flight_is_finished_at_the_end(
    rig: Rig, starter: Mapping[str, str], native: bool
) -> None:
    with rig.running(stdio_pod(), starter, native=native) as pod:
        pod.wait_ready()
        hold, codes = pod.volumes["data"] / "hold", list[int]()
        hold.touch()
        client = threading.Thread(target=lambda: codes.append(call(pod, "get_ticket", id=4711)))
        client.start()
        wait_until(lambda: done(log(pod)) == ["get_ticket"], "the call is in flight")
        ender = threading.Thread(target=pod.delete)
        ender.start()
        path = pod.volumes["mcp-opa-sidecar-stdio"] / "app.sock"
        wait_until(lambda: not path.exists(), "nobody new comes")
        hold.unlink()
        client.join()
        ender.join()
        assert codes == [0], pod.logs()
        codes_at_the_end = {name: each.codes[-1] for name, each in pod.members.items()}
        assert codes_at_the_end == {"mcp-shim": 0, "mcp-opa": 0, "mcp-sidecar": 0, "app": 0}
