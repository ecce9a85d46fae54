"""Replicas of the injector that make their certificates themselves, with the account of `k8s/`.

Each replica is asked about the pods of one namespace, so that what the API server finds there is
what this replica serves. Secret and registration have the names that the account has rights for.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryptography import x509

from tests.cluster.control_plane import LOOPBACK, Cluster, Json, free_port
from tests.cluster.registered import DEV, IMAGE, KINDS, create_namespace, pod_of, rendered
from tests.support.processes import Process, get, sidecar, wait_until

SYSTEM = "mcp-opa-sidecar-system"
ACCOUNT = "mcp-opa-sidecar-injector"
SECRET = "mcp-opa-sidecar-injector-tls"
REGISTRATION = "mcp-opa-sidecar"
RIGHTS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
NAMESPACES = ("kept-1", "kept-2")


class Replica:
    """One of them: `namespace` is whose pods it is asked about."""

    def __init__(self, process: Process, namespace: str, port: int) -> None:
        self.process, self.namespace, self.port = process, namespace, port
        self.health = process.wait_for(r"/metrics on (http://[0-9.:]+)")[1]

    def is_ready(self) -> bool:
        return get(f"{self.health}/readyz")[0] == 200

    def wait_ready(self) -> None:
        wait_until(self.is_ready, "the replica is ready")

    def certificate(self) -> x509.Certificate:
        """What it serves."""
        text = ssl.get_server_certificate((LOOPBACK, self.port), timeout=5)
        return x509.load_pem_x509_certificate(text.encode())

    def metric(self, name: str) -> float:
        """The value of a series; 0 where there is none yet."""
        text = get(f"{self.health}/metrics")[1].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


class Rig:
    """The account, its rights, and the registration."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.ports = dict(zip(NAMESPACES, (free_port(), free_port()), strict=True))
        found = json.loads(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
        self.url: str = found["server"]
        self._authority = base64.b64decode(found["certificate-authority-data"])
        self._manifests = rendered(cluster.parts, DEV)

    def set_up(self) -> None:
        """Whatever a cluster has before an injector is started in it for the first time."""
        [namespace] = [each for each in self._manifests if each["kind"] == "Namespace"]
        self.cluster.kubectl("apply", "-f", "-", given=namespace)
        for name in NAMESPACES:
            create_namespace(self.cluster, name, {})
        self.entitle()
        command = ("create", "token", ACCOUNT, "-n", SYSTEM, "--duration=2h")
        for name, content in (
            ("token", self.cluster.kubectl(*command).encode()),
            ("ca.crt", self._authority),
            ("namespace", SYSTEM.encode()),
        ):
            (self.folder / name).write_bytes(content)

    def entitle(self) -> None:
        """The rights that the manifests give."""
        rights = [each for each in self._manifests if each["kind"] in RIGHTS]
        self.cluster.kubectl("apply", "-f", "-", given=rights)

    def disentitle(self) -> None:
        """Take all of them."""
        for kind in ("rolebinding", "clusterrolebinding"):
            self.cluster.kubectl(
                "delete", kind, "-n", SYSTEM, "-l", "app.kubernetes.io/part-of=mcp-opa-sidecar"
            )

    def empty(self) -> None:
        """Without a Secret, and with registrations in which nobody is believed yet."""
        self.cluster.kubectl("delete", "secret", SECRET, "-n", SYSTEM, "--ignore-not-found")
        for kind in KINDS:
            self.cluster.kubectl("delete", kind, REGISTRATION, "--ignore-not-found")
        found = [self._registered(each) for each in self._manifests if each["kind"] in KINDS]
        self.cluster.kubectl("create", "-f", "-", given=found)

    def _registered(self, manifest: Json) -> Json:
        """For each replica, with what selects by namespace, under the name of that."""
        webhooks = []
        for namespace, port in self.ports.items():
            name = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": [namespace]}
            for each in manifest["webhooks"]:
                if each["name"].split(".")[0] in ("namespace", "injected"):
                    path = each["clientConfig"]["service"]["path"]
                    config = {"url": f"https://{LOOPBACK}:{port}{path}"}
                    selector = {"matchExpressions": [name]}
                    changed = {"clientConfig": config, "namespaceSelector": selector}
                    webhooks.append({**each, **changed, "name": f"{namespace}.{each['name']}"})
        return {**manifest, "webhooks": webhooks}

    def started(self, namespace: str, settings: Mapping[str, Any]) -> Process:
        """A replica's process."""
        file = self.folder / f"{namespace}.yaml"
        file.write_text(json.dumps({"image": IMAGE, **settings}), encoding="utf-8")
        return Process(
            sidecar(
                "webhook", "--self-signed", f"--listen={LOOPBACK}:{self.ports[namespace]}",
                f"--health={LOOPBACK}:0", f"--config={file}", f"--host={LOOPBACK}",
                f"--api-server={self.url}", f"--account={self.folder}",
            )
        )  # fmt: skip

    @contextmanager
    def replica(self, namespace: str = NAMESPACES[0], **settings: Any) -> Iterator[Replica]:
        """A running one."""
        with self.started(namespace, settings) as process:
            yield Replica(process, namespace, self.ports[namespace])

    def secret(self) -> dict[str, bytes]:
        """What is in the Secret; nothing when there is none."""
        done = self.cluster.run("get", "secret", SECRET, "-n", SYSTEM, "-o", "json")
        data = json.loads(done.stdout)["data"] if done.returncode == 0 else {}
        return {name: base64.b64decode(value) for name, value in data.items()}

    def bundles(self) -> set[bytes]:
        """What both registrations hold, of all their webhooks."""
        return {
            base64.b64decode(webhook["clientConfig"].get("caBundle", ""))
            for kind in KINDS
            for webhook in self.cluster.get(kind, REGISTRATION)["webhooks"]
        }

    def authorities(self) -> set[x509.Certificate]:
        """Those that every webhook believes."""
        read = [{*_certificates(each)} for each in self.bundles()]
        return set.intersection(*read)

    def refusal(self, namespace: str) -> str:
        """What the API server says to a pod that can not be injected, on a dry run."""
        without_port = pod_of(namespace, {"ports": []})
        done = self.cluster.run("create", "--dry-run=server", "-f", "-", given=without_port)
        return done.stderr

    def wait_asked(self, *replicas: Replica) -> None:
        """Until the API server believes them."""
        for each in replicas:
            each.wait_ready()

            def asked(namespace: str = each.namespace) -> bool:
                return "0 ports are called 'mcp'" in self.refusal(namespace)

            wait_until(asked, f"the API server asks the replica of {each.namespace}")


def _certificates(pem: bytes) -> list[x509.Certificate]:
    with suppress(ValueError):
        return x509.load_pem_x509_certificates(pem)
    return []


@contextmanager
def rig(cluster: Cluster, folder: Path) -> Iterator[Rig]:
    """One whose registration is gone again afterwards: nobody else's pods wait for it."""
    made = Rig(cluster, folder)
    made.set_up()
    try:
        yield made
    finally:
        for kind in KINDS:
            cluster.run("delete", kind, REGISTRATION, "--ignore-not-found")


def rules(cluster: Cluster, account: str, namespace: str) -> list[Json]:
    """What an account may do in a namespace."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    user = f"--as=system:serviceaccount:{SYSTEM}:{account}"
    command = ("create", "-f", "-", "-o", "json", "--validate=false", user)
    found: list[Json] = json.loads(cluster.kubectl(*command, given=review))["status"][
        "resourceRules"
    ]
    return found
