"""A real node: containerd and a kubelet, in namespaces of their own, from which no route leads out.

All of it is below one process that holds the namespaces. When that ends, so do the kernel's copies
of everything that the node made: processes, mounts, networks, settings of the network.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.control_plane import Cluster
from tests.pods.network import enter
from tests.support.processes import Process, alive, wait_until

NAME = "localhost"
"""The API server asks a node by its name first."""
ADDRESS = "192.0.2.1"
PODS = "203.0.113.0/24"
PAUSE = "localhost/pause:1"
SOCKET = "/run/containerd/containerd.sock"
CGROUPS = Path("/sys/fs/cgroup")
STARTING = 120.0

SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""What a kubelet sets, for the whole machine. It finds that somebody did, and leaves it alone."""

HOLDING = """
set -eu
ip link set lo up
ip address add "$2/32" dev lo
mount --bind "$1/var" /var
mount -t tmpfs none /run
(cd "$1/sysctl" && find . -type f) | while read -r each; do
    mount --bind "$1/sysctl/$each" "/proc/sys/$each"
done
exec "$3" -P
"""


class Unavailable(RuntimeError):
    """No node can be had here."""


@dataclass(frozen=True, slots=True)
class Node:
    """Where it is."""

    parts: Path
    folder: Path
    pid: int  # of the process that holds the namespaces
    cgroup: str

    def within(self, *command: str | Path) -> list[str | Path]:
        """The command, run where the node's processes are."""
        into = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts"]
        return [*into, *command]

    def load(self, images: Path) -> None:
        """Take the images of an archive, as a registry's would be."""
        ctr: list[str | Path] = [
            self.parts / "bin" / "ctr",
            f"--address={SOCKET}",
            "--namespace=k8s.io",
        ]
        command = self.within(*ctr, "images", "import", images)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    def volume(self, pod: dict[str, Any], name: str) -> Path:
        """An `emptyDir` of a pod."""
        pods = self.folder / "var" / "lib" / "kubelet" / "pods"
        uid: str = pod["metadata"]["uid"]
        return pods / uid / "volumes" / "kubernetes.io~empty-dir" / name


@contextmanager
def namespaces(parts: Path, folder: Path) -> Iterator[Node]:
    """A node without a process; who is in the block is in its network."""
    for name in ("var/lib/kubelet", "var/log", "var/tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "var" / "run").symlink_to("/run")
    for name, value in SYSCTLS.items():
        file = folder / "sysctl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    line: list[str | Path] = [
        "setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--net", "--ipc", "--uts",
        "--fork", "--kill-child", "--mount-proc", "--propagation=private",
        "sh", "-c", HOLDING, "node", folder, ADDRESS, parts / "bin" / "catatonit",
    ]  # fmt: skip
    with ExitStack() as stack:
        cgroup = stack.enter_context(_cgroup())
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        holder = subprocess.Popen(line, cwd="/", stdin=null, stdout=null, stderr=pipe)
        stack.callback(_end, holder)
        pid = _held(holder)
        stack.enter_context(_inside(Path(f"/proc/{pid}/ns/net")))
        yield Node(parts, folder, pid, cgroup)


def _held(holder: subprocess.Popen[bytes]) -> int:
    """The first process of the namespaces, once everything is where it shall be."""

    def first() -> int | None:
        if holder.poll() is not None:
            assert holder.stderr is not None
            raise Unavailable(holder.stderr.read().decode())
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(holder.pid).children():
                if each.name() == "catatonit":
                    return int(each.pid)
        return None

    found = wait_until(first, "the namespaces of the node")
    assert found is not None
    return found


def _end(holder: subprocess.Popen[bytes]) -> None:
    """The first process takes all others along, and is waited for by the one that made it."""
    with suppress(psutil.NoSuchProcess):
        for each in psutil.Process(holder.pid).children():
            each.kill()
    try:
        holder.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.communicate()


@contextmanager
def _inside(network: Path) -> Iterator[None]:
    """This thread, and what it starts, in a network until the block ends."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(network)
        yield
    finally:
        enter(Path(f"/proc/self/fd/{own}"))
        os.close(own)


@contextmanager
def _cgroup() -> Iterator[str]:
    """The name of one in every hierarchy that is there."""
    name = f"mcp-node-{secrets.token_hex(4)}"
    tops = [CGROUPS, *CGROUPS.iterdir()]
    roots = [each for each in tops if (each / "cgroup.procs").exists()]
    made = [each / name for each in (roots[:1] if CGROUPS in roots else roots)]
    try:
        for each in made:
            each.mkdir()
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (each / file).exists():
                    (each / file).write_text((each.parent / file).read_text())
        yield name
    finally:
        for each in made:
            wait_until(partial(_removed, each), f"nobody is in {each}")


def _removed(cgroup: Path) -> bool:
    for each, _, _ in os.walk(cgroup, topdown=False):
        with suppress(OSError):  # who was in it has not quite ended
            Path(each).rmdir()
    return not cgroup.exists()


@contextmanager
def running(node: Node, cluster: Cluster, images: Path) -> Iterator[None]:
    """Its daemons, until the block ends, and it is ready when the block begins."""
    environment = {
        "PATH": f"{node.parts / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
        "LD_LIBRARY_PATH": str(node.parts / "lib"),
    }
    with ExitStack() as stack:

        def daemon(*command: str | Path) -> Process:
            line = node.within("setpriv", "--pdeathsig=TERM", *command)  # nsenter passes nothing on
            return stack.enter_context(Process(line, env=environment))

        containerd = daemon("containerd", f"--config={_containerd(node)}")
        wait_until(lambda: _serves(node, containerd), "containerd", STARTING)
        node.load(images)
        kubelet = daemon(
            cluster.parts / "kubelet", f"--kubeconfig={cluster.kubeconfig}",
            f"--config={_kubelet(node)}", f"--hostname-override={NAME}", f"--node-ip={ADDRESS}",
        )  # fmt: skip

        def ready() -> bool:
            assert alive(kubelet.pid), kubelet.tail()
            path = '-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}'
            return cluster.run("get", "node", NAME, path).stdout == "True"

        wait_until(ready, "the node is ready", STARTING)
        yield


def _serves(node: Node, containerd: Process) -> bool:
    assert alive(containerd.pid), containerd.tail()
    command = node.within(node.parts / "bin" / "ctr", f"--address={SOCKET}", "version")
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def _containerd(node: Node) -> Path:
    """Its configuration. This machine may not let it lower what it has of `oom_score_adj`."""
    networks = node.folder / "networks"
    networks.mkdir()
    plugin = {
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": PODS}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    (networks / "pods.conflist").write_text(
        json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [plugin]})
    )
    file = node.folder / "containerd.toml"
    file.write_text(
        f"""
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{node.parts / "cni"}"
conf_dir = "{networks}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
    )
    return file


def _kubelet(node: Node) -> Path:
    """Its configuration. Nobody but the rig, and what runs on it, reaches where it listens."""
    names = node.folder / "resolv.conf"
    names.touch()
    file = node.folder / "kubelet.json"
    said = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "evictionHard": {
            f"{kind}.{what}": "0%"
            for kind in ("imagefs", "nodefs")
            for what in ("available", "inodesFree")
        },
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": False,
        "maxOpenFiles": 20000,
        "oomScoreAdj": 0,
        "resolvConf": str(names),
        "syncFrequency": "1s",
    }
    file.write_text(json.dumps(said))
    return file
