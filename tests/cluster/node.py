"""What nodes would do with the pods of the tutorial, done with processes.

The pods are those that the real controllers have made, as the API server has them. All are in the
two network namespaces of one pod's network: the MCP server's inside, everybody else's outside.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.cluster.control_plane import LOOPBACK, Cluster, Json, free_port
from tests.cluster.registered import KINDS
from tests.pods import spec
from tests.pods.conftest import Rig
from tests.pods.container import Image
from tests.pods.network import OUTSIDE_IP, POD_IP, Network
from tests.pods.runner import Pod
from tests.support.processes import Process, environment, get, sidecar, wait_until

SIDECAR, PYTHON = "mcp-opa-sidecar:dev", "docker.io/library/python:3.13-slim-bookworm"
REGISTRATION = "mcp-opa-sidecar"
QUERY = 16686
ADDRESSES = {"tickets": POD_IP, "jaeger": LOOPBACK}
"""Of the pods behind Services, where other pods are."""


class Node:
    """Runs pods, for as long as the block lasts."""

    def __init__(self, cluster: Cluster, rig: Rig, jaeger: Path, folder: Path) -> None:
        self.cluster, self.rig, self.jaeger_bin, self.folder = cluster, rig, jaeger, folder
        self.network, self.running = Network(), dict[str, Pod]()
        self._stack = ExitStack()

    def __enter__(self) -> Node:
        self._stack.enter_context(self.network)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def run(self, namespace: str, name: str) -> None:
        """Do what a node does with a Deployment's pod, and tell the API server that it is ready."""
        deployment = self.cluster.get("deployment", name, "-n", namespace)
        pod = self._pod(namespace, deployment["spec"]["selector"]["matchLabels"])
        RUNS[name](self, pod)
        status = {
            "phase": "Running",
            "podIPs": [{"ip": POD_IP}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self.cluster.kubectl(
            "patch", "pod", pod["metadata"]["name"], "-n", namespace, "--subresource=status",
            "--type=merge", "-p", json.dumps({"status": status}),
        )  # fmt: skip

    def services(self) -> Iterator[tuple[str, str]]:
        """Where the Services of the tutorial lead: from name and port, to address and port."""
        for each in self.cluster.get("services", "-A")["items"]:
            name, namespace = each["metadata"]["name"], each["metadata"]["namespace"]
            if name in ADDRESSES:
                pod = self._pod(namespace, each["spec"]["selector"])
                for port in each["spec"]["ports"]:
                    place = f"{ADDRESSES[name]}:{_target(port['targetPort'], pod)}"
                    yield f"{name}.{namespace}:{port['port']}", place

    def _pod(self, namespace: str, labels: dict[str, str]) -> Json:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        [pod] = self.cluster.pods(namespace, selector)
        return pod

    def jaeger(self, pod: Json) -> None:
        """By the binary of `make jaeger`, as its pod says."""
        [container] = pod["spec"]["containers"]
        env = {**environment(), **spec.environment(container["env"], {})}
        command = ("nsenter", f"--net={self.network.outside}", self.jaeger_bin)
        self._stack.enter_context(Process(command, env=env))

        def answers() -> bool:
            with suppress(OSError):
                return get(f"http://{LOOPBACK}:{QUERY}/")[0] == 200
            return False

        wait_until(lambda: self.network.from_outside(answers), "Jaeger answers")

    def injector(self, pod: Json) -> None:
        """On the loopback, where the API server finds it, with the token of its account."""
        [container] = pod["spec"]["containers"]
        settings, port = self._mounted(pod, "settings"), free_port()
        here = {
            "/etc/mcp-opa-sidecar/": f"{settings}/",
            "0.0.0.0:8443": f"{LOOPBACK}:{port}",
            "0.0.0.0:8081": f"{LOOPBACK}:0",
        }
        env = spec.environment(container["env"], {})
        words = [spec.expand(each, env) for each in (*container["command"], *container["args"])]
        for theirs, ours in here.items():
            words = [each.replace(theirs, ours) for each in words]
        account, url = self._account(pod)
        beside = ("--api-server", url, "--account", account, "--host", LOOPBACK)
        self._reach(port)
        process = self._stack.enter_context(Process(sidecar(*words[1:], *beside)))
        health = process.wait_for(r'on (http://[^\s"]+)')[1]
        wait_until(lambda: get(f"{health}/readyz")[0] == 200, "the injector is ready")

    def _account(self, pod: Json) -> tuple[Path, str]:
        """The folder that a kubelet mounts for an account, and where the API server is."""
        folder, namespace = self.folder / "account", pod["metadata"]["namespace"]
        name = pod["spec"]["serviceAccountName"]
        [server] = json.loads(self.cluster.kubeconfig.read_text("utf-8"))["clusters"]
        folder.mkdir()
        token = self.cluster.kubectl("create", "token", name, "-n", namespace)
        (folder / "token").write_text(token, "utf-8")
        (folder / "namespace").write_text(namespace, "utf-8")
        authority = base64.b64decode(server["cluster"]["certificate-authority-data"])
        (folder / "ca.crt").write_bytes(authority)
        return folder, server["cluster"]["server"]

    def _reach(self, port: int) -> None:
        """Both registrations name the Service, which leads nowhere here: they get its place."""
        for kind in KINDS:
            webhooks = self.cluster.get(kind, REGISTRATION)["webhooks"]
            patch = [
                {
                    "op": "replace",
                    "path": f"/webhooks/{number}/clientConfig",
                    "value": {
                        "url": f"https://{LOOPBACK}:{port}{each['clientConfig']['service']['path']}"
                    },
                }
                for number, each in enumerate(webhooks)
            ]
            self.cluster.kubectl(
                "patch", kind, REGISTRATION, "--type=json", "-p", json.dumps(patch)
            )

    def tickets(self, pod: Json) -> None:
        """By the pod runner, as the pod is in the API."""
        python = Image(folders={}, env={"PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin"})
        running = Pod(
            pod,
            images={SIDECAR: self.rig.images["sidecar"], PYTHON: python},
            config_maps=self._config_maps(pod),
            folder=self.folder / "tickets",
            network=self.network,
            hosts={"jaeger.observability": OUTSIDE_IP},
        )
        self.running["tickets"] = self._stack.enter_context(running)
        running.wait_ready()

    def client(self, pod: Json) -> None:
        """What is executed in it is run outside of the other pod: see `IN_PLACE`."""

    def _config_maps(self, pod: Json) -> dict[str, dict[str, str]]:
        said = [each["configMap"] for each in pod["spec"]["volumes"] if "configMap" in each]
        return {each["name"]: self._config_map(pod, each["name"]) for each in said}

    def _config_map(self, pod: Json, name: str) -> dict[str, str]:
        data: dict[str, str] = self.cluster.get(
            "configmap", name, "-n", pod["metadata"]["namespace"]
        )["data"]
        return data

    def _mounted(self, pod: Json, volume: str) -> Path:
        [said] = [each for each in pod["spec"]["volumes"] if each["name"] == volume]
        folder = self.folder / volume
        folder.mkdir()
        for name, text in self._config_map(pod, said["configMap"]["name"]).items():
            (folder / name).write_text(text, "utf-8")
        return folder


def _target(port: str | int, pod: Json) -> int:
    """The number of a port that a pod's containers may have a name for."""
    declared = [each for container in pod["spec"]["containers"] for each in container["ports"]]
    [number] = [each["containerPort"] for each in declared if port in each.values()]
    return int(number)


RUNS: dict[str, Callable[[Node, Json], None]] = {
    "jaeger": Node.jaeger,
    "mcp-opa-sidecar-injector": Node.injector,
    "tickets": Node.tickets,
    "client": Node.client,
}
