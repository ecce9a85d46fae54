"""The injector's process, registered as `k8s/` registers it but for where it is reached."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import LOOPBACK, Cluster, Json, free_port
from tests.support.certificates import Authority
from tests.support.pods import pod
from tests.support.processes import ROOT, Process, sidecar, wait_until

DEV = ROOT / "k8s" / "overlays" / "dev"
PRODUCTION = ROOT / "k8s" / "overlays" / "production"
IMAGE = "example.com/mcp-opa-sidecar@sha256:" + "0" * 64
KINDS = "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"
PROBE = "probe"
ENABLED = {"mcp-opa-sidecar.io/injection": "enabled"}


def rendered(parts: Path, folder: Path) -> list[Json]:
    """The manifests of a folder, by kustomize."""
    command: list[str | Path] = [parts / "kubectl", "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return list(yaml.safe_load_all(done.stdout))


class Injector:
    """`mcp-sidecar webhook` on a port that stays the same, however often it is started."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.port = cluster, folder, free_port()
        self.authority = Authority()
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"
        self.process: Process | None = None
        self._settings: Mapping[str, Any] = {}
        self._registrations = 0

    def start(self, **settings: Any) -> None:
        """Start it with these settings beside those of the overlay."""
        self.stop()
        file = self.folder / "injector.yaml"
        overlay = yaml.safe_load((DEV / "injector.yaml").read_text(encoding="utf-8"))
        file.write_text(json.dumps({**overlay, "image": IMAGE, **settings}), encoding="utf-8")
        command = sidecar(
            "webhook", f"--listen={LOOPBACK}:{self.port}", f"--health={LOOPBACK}:0",
            f"--config={file}", f"--cert={self.cert}", f"--key={self.key}",
        )  # fmt: skip
        self._settings, self.process = settings, Process(command)
        self.process.wait_for("reviewing pods on")

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            process, self.process = self.process, None
            with process:
                pass

    def certify(self, authority: Authority) -> None:
        """Put another certificate into its files, as a mounted Secret changes: by renaming."""
        made = authority.server().saved(self.folder, "new")
        for new, file in zip(made, (self.cert, self.key), strict=True):
            new.rename(file)

    def register(self, *authorities: Authority) -> None:
        """Tell the API server where it is and whose certificates to believe, until it knows.

        The webhooks' names begin with a number of their own each time: they are in what the API
        server says of a refusal, and so tell which registration is in force.
        """
        self._registrations += 1
        number = f"r{self._registrations}"
        bundle = base64.b64encode(b"".join(each.pem for each in authorities)).decode()
        found = [each for each in rendered(self.cluster.parts, DEV) if each["kind"] in KINDS]
        for manifest in found:
            manifest["metadata"]["name"] = "mcp-opa-sidecar-on-loopback"
            for webhook in manifest["webhooks"]:
                path = webhook["clientConfig"]["service"]["path"]
                url = f"https://{LOOPBACK}:{self.port}{path}"
                webhook["clientConfig"] = {"url": url, "caBundle": bundle}
                webhook["name"] = f"{number}.{webhook['name']}"
        self.cluster.kubectl("apply", "-f", "-", given=found)
        wait_until(lambda: self._mutates(number), "the API server asks the mutating webhook")
        self.cluster.kubectl("apply", "-n", PROBE, "-f", "-", given=pod_of(PROBE))
        wait_until(lambda: self._validates(number), "the API server asks the validating webhook")

    def _mutates(self, number: str) -> bool:
        without_port = pod_of(PROBE, {"ports": []})
        done = self.cluster.run("create", "--dry-run=server", "-f", "-", given=without_port)
        return f'"{number}.namespace.mcp-opa-sidecar.io" denied' in done.stderr

    def _validates(self, number: str) -> bool:
        command = ("label", "pod", PROBE, "-n", PROBE, "--dry-run=server")
        done = self.cluster.run(*command, "mcp-opa-sidecar.io/injected-")
        return f'"{number}.injected.mcp-opa-sidecar.io" denied' in done.stderr

    def restored(self) -> None:
        """As it was at first."""
        if self.process is None or self._settings:
            self.start()


@contextmanager
def injector(cluster: Cluster, folder: Path) -> Iterator[Injector]:
    """A running one, once the API server asks it."""
    made = Injector(cluster, folder)
    made.certify(made.authority)
    try:
        made.start()
        create_namespace(cluster, PROBE, ENABLED)
        made.register(made.authority)
        yield made
    finally:
        made.stop()


def create_namespace(cluster: Cluster, name: str, labels: Mapping[str, str]) -> None:
    """One in which pods can be made: that takes an account, which a controller makes."""
    metadata = {"name": name, "labels": {**labels}}
    cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})

    def account() -> bool:
        return cluster.run("get", "serviceaccount", "default", "-n", name).returncode == 0

    wait_until(account, f"an account in {name}")


def pod_of(namespace: str, container: Json | None = None, **spec: Any) -> Json:
    """A pod with one server, in a namespace and of its name."""
    found = pod(container, **spec)
    return {**found, "metadata": {"name": namespace, "namespace": namespace}}
