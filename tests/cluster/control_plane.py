"""A cluster's control plane on loopback: etcd, API server, controller manager, and no node.

What is admitted is what the real API server admits, and a Deployment's pods are what the real
controllers make of it. Nothing is ever scheduled.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.support.certificates import Authority
from tests.support.processes import Process, alive, get, wait_until

Json = dict[str, Any]
Done = subprocess.CompletedProcess[str]

LOOPBACK = "127.0.0.1"
STARTING = 120.0
CONTROLLERS = (
    "cronjob-controller",
    "deployment-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "replicaset-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
)


@dataclass(frozen=True)
class Cluster:
    """Where it is, and how its administrator speaks with it."""

    parts: Path
    kubeconfig: Path

    def run(self, *arguments: str | Path, given: Any = None) -> Done:
        """kubectl, whatever comes of it; `given` is a manifest for its stdin, or several."""
        home = self.kubeconfig.parent
        environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        return subprocess.run(
            [self.parts / "kubectl", f"--kubeconfig={self.kubeconfig}", *map(str, arguments)],
            input=None if given is None else _text(given),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def kubectl(self, *arguments: str | Path, given: Any = None) -> str:
        """Its output; it has to succeed."""
        done = self.run(*arguments, given=given)
        assert done.returncode == 0, f"kubectl {arguments}: {done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> Json:
        """An object, or a list of them, as the API has it."""
        found: Json = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def refused(self, *arguments: str | Path, given: Any = None) -> str:
        """What kubectl says to who runs it; it has to fail."""
        done = self.run(*arguments, given=given)
        assert done.returncode != 0, f"kubectl {arguments} was let: {done.stdout}"
        return done.stderr

    def create(self, manifest: Any, *flags: str) -> Json:
        """Create one object; what the API server made of it."""
        command = ("create", "-f", "-", "-o", "json", *flags)
        found: Json = json.loads(self.kubectl(*command, given=manifest))
        return found

    def pods(self, namespace: str, label: str) -> list[Json]:
        """The pods with a label, once there are any."""

        def look() -> list[Json]:
            found: list[Json] = self.get("pods", "-n", namespace, "-l", label)["items"]
            return found

        return wait_until(look, f"a pod with {label}")


def _text(given: Any) -> str:
    if isinstance(given, list):
        given = {"apiVersion": "v1", "kind": "List", "items": given}
    return json.dumps(given)


@contextmanager
def cluster(parts: Path, folder: Path) -> Iterator[Cluster]:
    """A running one, until the block ends."""
    authority, token, port = Authority(), secrets.token_hex(16), free_port()
    authority.server().saved(folder, "api")
    (folder / "ca.pem").write_bytes(authority.pem)
    (folder / "accounts.key").write_bytes(_rsa_key())
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    made = Cluster(parts, folder / "kubeconfig")
    said = _kubeconfig(f"https://{LOOPBACK}:{port}", authority.pem, token)
    made.kubeconfig.write_text(json.dumps(said))
    with ExitStack() as stack:
        etcd = _etcd(stack, parts, folder)
        process = stack.enter_context(_api_server(parts, folder, etcd, port))

        def answers(*arguments: str) -> bool:
            assert alive(process.pid), process.tail()
            return made.run(*arguments).returncode == 0

        wait_until(lambda: answers("get", "--raw", "/readyz"), "the API server", STARTING)
        _controllers(stack, parts, folder, made.kubeconfig)
        # Of the controllers' making; without it no pod is admitted.
        wait_until(lambda: answers("get", "serviceaccount", "default"), "an account", STARTING)
        yield made


def _etcd(stack: ExitStack, parts: Path, folder: Path) -> str:
    client, peer = (f"http://{LOOPBACK}:{free_port()}" for _ in range(2))
    command: list[str | Path] = [
        parts / "etcd", "--name=one", f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=one={peer}", "--log-level=warn",
    ]  # fmt: skip
    stack.enter_context(Process(command))

    def healthy() -> bool:
        with suppress(OSError):
            return get(f"{client}/health")[0] == 200
        return False

    wait_until(healthy, "etcd is healthy", STARTING)
    return client


def _api_server(parts: Path, folder: Path, etcd: str, port: int) -> Process:
    command: list[str | Path] = [
        parts / "kube-apiserver", f"--etcd-servers={etcd}", f"--bind-address={LOOPBACK}",
        f"--secure-port={port}", f"--advertise-address={LOOPBACK}",
        "--endpoint-reconciler-type=none", f"--cert-dir={folder}",
        f"--tls-cert-file={folder / 'api.pem'}", f"--tls-private-key-file={folder / 'api.key'}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        f"--service-account-key-file={folder / 'accounts.key'}",
        f"--service-account-signing-key-file={folder / 'accounts.key'}",
        "--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/24", "--allow-privileged", "--profiling=false",
    ]  # fmt: skip
    return Process(command)


def _controllers(stack: ExitStack, parts: Path, folder: Path, kubeconfig: Path) -> None:
    command: list[str | Path] = [
        parts / "kube-controller-manager", f"--kubeconfig={kubeconfig}",
        f"--controllers={','.join(CONTROLLERS)}", "--leader-elect=false",
        f"--bind-address={LOOPBACK}", f"--secure-port={free_port()}", f"--cert-dir={folder}",
        f"--root-ca-file={folder / 'ca.pem'}", "--profiling=false",
    ]  # fmt: skip
    stack.enter_context(Process(command))


def _kubeconfig(url: str, authority: bytes, token: str) -> Json:
    certificate = base64.b64encode(authority).decode()
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "admin"}}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "clusters": [
            {"name": "it", "cluster": {"server": url, "certificate-authority-data": certificate}}
        ],
    }


def _rsa_key() -> bytes:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        port: int = found.getsockname()[1]
        return port
