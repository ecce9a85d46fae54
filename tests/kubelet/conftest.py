"""One node with its cluster and its injector for all tests of the folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import yaml

from tests.cluster.control_plane import LOOPBACK, Cluster, cluster, free_port
from tests.cluster.registered import Injector, create_namespace, injector
from tests.kubelet.images import APP, SERVER, SIDECAR, images
from tests.kubelet.node import NAME, Node, Unavailable, namespaces, running
from tests.pods import image as sidecar_image
from tests.support.processes import (
    ROOT,
    STARTER,
    Process,
    done,
    environment,
    sidecar,
    wait_until,
)  # fmt: skip
from tests.support.reaching import connects

Json = dict[str, Any]

CONFIG = "identity: {static: {type: human, id: ana}, static_for_all: true}\n"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
HARMLESS = {
    "runAsNonRoot": True,
    "runAsUser": 1001,
    "runAsGroup": 1001,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True, slots=True)
class Rig:
    """What there is."""

    cluster: Cluster
    node: Node
    injector: Injector
    opa: Path
    folder: Path
    numbers: Iterator[int] = field(default_factory=count)

    def policy(self, source: Path) -> Json:
        """`mcp-sidecar policy build SOURCE -o configmap.yaml`"""
        target = self.folder / "configmap.yaml"
        subprocess.run(
            sidecar("policy", "build", source, "-o", target),
            env=environment(self.opa), cwd=ROOT, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        found: Json = yaml.safe_load(target.read_text("utf-8"))
        return found

    @contextmanager
    def namespace(
        self, labels: Json, *, policy: Path = STARTER, config: str = CONFIG, **settings: Any
    ) -> Iterator[str]:
        """A namespace with a policy, whose pods are injected by an injector with these settings."""
        self.injector.start(image=SIDECAR, pull_policy="Never", config="config", **settings)
        name = f"support-{next(self.numbers)}"
        create_namespace(self.cluster, name, labels)
        maps = [
            self.policy(policy),
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "config"},
                "data": {"config.yaml": config},
            },
        ]
        self.cluster.kubectl("apply", "-n", name, "-f", "-", given=maps)
        try:
            yield name
        finally:
            self.cluster.run("delete", "namespace", name, "--wait=false")

    def create(self, namespace: str, template: Json, **metadata: Any) -> Pod:
        """A pod of it, by itself."""
        metadata |= {**template["metadata"], "name": "tickets", "namespace": namespace}
        self.cluster.create({"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata})
        return Pod(self, namespace, "tickets")

    def deploy(self, namespace: str, template: Json) -> Pod:
        """A Deployment of it, by kubectl; its pod, as soon as there is one."""
        labels = {"app": "tickets"}
        metadata = {**template["metadata"], "labels": labels}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "tickets", "namespace": namespace},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {**template, "metadata": metadata},
            },
        }
        self.cluster.kubectl("apply", "-f", "-", given=deployment)
        (found,) = self.cluster.pods(namespace, "app=tickets")
        return Pod(self, namespace, found["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that runs, or is about to."""

    rig: Rig
    namespace: str
    name: str

    def get(self) -> Json:
        return self.rig.cluster.get("pod", self.name, "-n", self.namespace)

    @property
    def ip(self) -> str:
        found: str = wait_until(lambda: self.get()["status"].get("podIP"), "the pod's address")
        return found

    @property
    def ready(self) -> bool:
        conditions = self.get()["status"].get("conditions") or ()
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    @property
    def gone(self) -> bool:
        """Whether the API server knows it no more."""
        return self.rig.cluster.run("get", "pod", self.name, "-n", self.namespace).returncode != 0

    def done(self) -> list[str]:
        """What its server has done."""
        log = self.volume("data") / "log"
        return done(log) if log.exists() else []

    def wait_ready(self) -> None:
        try:
            wait_until(lambda: self.ready, "the pod is ready", 60)
        except TimeoutError as error:
            raise AssertionError(self.story()) from error

    def status(self, container: str) -> Json:
        """What the kubelet says of a container."""
        status = self.get()["status"]
        found = [
            each
            for kind in ("initContainerStatuses", "containerStatuses")
            for each in status.get(kind) or ()
        ]
        return next((each for each in found if each["name"] == container), {})

    def ended(self, *containers: str) -> list[Json]:
        """How they ended, once all of them have."""
        states = [self.status(each).get("state", {}) for each in containers]
        found = [each["terminated"] for each in states if "terminated" in each]
        return found if len(found) == len(containers) else []

    def failures(self, container: str) -> set[int]:
        """With which codes it has ended lately."""
        status = self.status(container)
        states = [status.get(each, {}).get("terminated") for each in ("state", "lastState")]
        return {each["exitCode"] for each in states if each}

    def log(self, container: str, *flags: str) -> str:
        """What it has written; nothing where it has not begun."""
        return self.rig.cluster.run(
            "logs", self.name, "-n", self.namespace, "-c", container, *flags
        ).stdout

    def exec(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """`kubectl exec`"""
        words = ("exec", self.name, "-n", self.namespace, "-c", container, "--", *command)
        return self.rig.cluster.run(*words)

    def python(self, container: str, program: str) -> str:
        """What a program prints that runs in a container, as its user."""
        done = self.exec(container, "python3", "-c", program)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @contextmanager
    def forwarded(self, port: int) -> Iterator[int]:
        """`kubectl port-forward`: the runtime dials the pod's loopback from the node."""
        own, kubectl = free_port(), self.rig.cluster.parts / "kubectl"
        config = f"--kubeconfig={self.rig.cluster.kubeconfig}"
        words = ("port-forward", f"pod/{self.name}", f"--namespace={self.namespace}")
        with Process([kubectl, config, *words, f"{own}:{port}"]):
            wait_until(lambda: connects(LOOPBACK, own), "the port is forwarded")
            yield own

    def volume(self, name: str) -> Path:
        """An `emptyDir` of it."""
        return self.rig.node.volume(self.get(), name)

    def story(self) -> str:
        """All that is known of it, for who reads why a test failed."""
        told = [self.rig.cluster.run("describe", "pod", self.name, "-n", self.namespace).stdout]
        spec = self.get()["spec"]
        for kind in ("initContainers", "containers"):
            for each in spec.get(kind) or ():
                told += [f"── {each['name']}", self.log(each["name"])]
        return "\n".join(told)


def server(*arguments: str, **spec: Any) -> Json:
    """The template of a pod with one server, for the node."""
    return {
        "metadata": {},
        "spec": {
            "nodeName": NAME,
            "terminationGracePeriodSeconds": 20,
            "containers": [
                {
                    "name": "app",
                    "image": APP,
                    "imagePullPolicy": "Never",
                    "command": [*SERVER, *arguments],
                    "securityContext": HARMLESS,
                    "ports": [{"name": "mcp", "containerPort": 8080}],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    "readinessProbe": {
                        "httpGet": {"path": "/healthz", "port": "mcp"},
                        "periodSeconds": 1,
                        "failureThreshold": 1,
                    },
                }
            ],
            "volumes": [{"name": "data", "emptyDir": {}}],
            **spec,
        },
    }


@pytest.fixture(scope="package")
def rig(
    cluster_parts: Path,
    containerd_parts: Path,
    opa_bin: Path,
    nft_usr: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    """All of it, while the tests of this folder run: they are in the node's network."""
    folder = tmp_path_factory.mktemp("node")
    for each in ("images", "node", "cluster", "injector"):
        (folder / each).mkdir()
    with ExitStack() as stack:
        stack.callback(rmtree, folder)  # of gigabytes, of which pytest would keep three
        try:
            node = stack.enter_context(namespaces(containerd_parts, folder / "node"))
        except (Unavailable, OSError) as error:
            pytest.skip(f"missing: namespaces and cgroups (run as root): {error}")
        image = sidecar_image.image(folder / "image", opa_bin.resolve(), {"nftables": nft_usr})
        archive = images(folder / "images", image, containerd_parts / "bin" / "catatonit")
        made = stack.enter_context(cluster(cluster_parts, folder / "cluster"))
        stack.enter_context(running(node, made, archive))
        webhook = stack.enter_context(injector(made, folder / "injector"))
        yield Rig(made, node, webhook, opa_bin, folder)
