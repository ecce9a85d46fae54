"""The rig's own claims: a node that nothing leads out of, and of which nothing stays."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.kubelet.conftest import Pod, Rig, server
from tests.kubelet.node import CGROUPS, SYSCTLS, namespaces
from tests.support.processes import wait_until
from tests.support.reaching import PORT, asked

ELSEWHERE = "198.51.100.1"
NETWORK = Path("/proc/thread-self/ns/net")


@pytest.fixture
def plain(rig: Rig) -> Iterator[Pod]:
    with rig.namespace({}) as namespace:
        found = rig.deploy(namespace, server())
        found.wait_ready()
        yield found


def test_a_plain_pod_is_reached_and_reaches_nobody_elsewhere(plain: Pod) -> None:
    """So it is the sidecar that keeps others out where there is one."""
    assert [each["name"] for each in plain.get()["spec"]["containers"]] == ["app"]
    assert asked(plain.ip, "GET", PORT, "/healthz") == 200
    connecting = "import socket; print(socket.socket().connect_ex(({!r}, 80)))"
    unreachable = {errno.ENETUNREACH, errno.EHOSTUNREACH}
    assert int(plain.python("app", connecting.format(ELSEWHERE))) in unreachable
    with socket.socket() as client:
        assert client.connect_ex((ELSEWHERE, 80)) == errno.ENETUNREACH


def settings() -> dict[str, str]:
    kept = [*SYSCTLS, "net/ipv4/ip_forward", "net/ipv4/conf/all/forwarding"]
    return {each: (Path("/proc/sys") / each).read_text() for each in kept}


def left(cgroup: str) -> list[Path]:
    return list(CGROUPS.glob(f"**/{cgroup}"))


def test_nothing_of_it_stays(containerd_parts: Path, tmp_path: Path) -> None:
    mounts, before = Path("/proc/self/mounts").read_text(), settings()
    network = NETWORK.readlink()
    with namespaces(containerd_parts, tmp_path) as node:
        assert NETWORK.readlink() != network
        assert left(node.cgroup)
        script = "echo 1 >/proc/sys/net/ipv4/ip_forward; mount -t tmpfs none /mnt; sleep 1000"
        busy = subprocess.Popen(node.within("sh", "-c", script))
        wait_until(lambda: settings()["net/ipv4/ip_forward"] == "1\n", "it is busy")
    assert busy.wait(30) != 0
    assert not psutil.pid_exists(node.pid)
    assert (Path("/proc/self/mounts").read_text(), settings()) == (mounts, before)
    assert NETWORK.readlink() == network
    assert left(node.cgroup) == []
