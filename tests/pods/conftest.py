"""Pods for the tests: injected by the command line's own function, run by the runner."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from sidecar.injector.injection import Injection
from sidecar.injector.plan import plan
from tests.pods import image as sidecar_image
from tests.pods.container import Image
from tests.pods.network import POD_IP, Network, Unavailable
from tests.pods.runner import Pod
from tests.support.pods import ENABLED, annotated
from tests.support.processes import ROOT, STARTER, environment, sidecar

CONFIG = "identity: {static: {type: human, id: ana}, static_for_all: true}\n"
SERVER = [sys.executable, "-m", "tests.pods.app", "--data", "/data"]

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rig:
    """What pods are made of here."""

    images: Mapping[str, Image]
    build: Callable[[Path], Json]
    folder: Path

    @contextmanager
    def running(
        self,
        pod: Json,
        policy: Mapping[str, str],
        *,
        config: str | None = CONFIG,
        change: Callable[[Json], None] = lambda planned: None,
        addresses: tuple[str, ...] = (POD_IP,),
        maps: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
        **injection: Any,
    ) -> Iterator[Pod]:
        """The pod, injected and started; `change` makes it another than the injector's."""
        name = None if config is None else "config"
        settings = Injection(image="sidecar", config=name, **injection)
        there = {"mcp-policy": policy, "config": {"config.yaml": config or ""}, **maps}
        folder = self.folder / f"pod-{len(list(self.folder.iterdir()))}"
        injected = plan(pod, ENABLED, settings)
        change(injected)
        with Pod(
            injected, images=self.images, config_maps=there, folder=folder, addresses=addresses
        ) as found:
            yield found


def server_pod(*arguments: str, neighbour: bool = False, **spec: Any) -> Json:
    """A pod with one server, and maybe somebody else in it who may reach it on loopback."""
    data = [{"name": "data", "mountPath": "/data"}]
    app: Json = {
        "name": "app", "image": "app", "command": [*SERVER, *arguments], "volumeMounts": data,
        "ports": [{"name": "mcp", "containerPort": 8080}],
        "readinessProbe": {
            "httpGet": {"path": "/healthz", "port": "mcp"},
            "periodSeconds": 1,
            "failureThreshold": 1,
        },
    }  # fmt: skip
    other: Json = {
        "name": "neighbour", "image": "app", "command": ["sleep", "infinity"],
        "securityContext": {"runAsUser": 1002, "runAsGroup": 1002},
    }  # fmt: skip
    found: Json = {
        "metadata": {"name": "tickets", "namespace": "support", "labels": {"app": "tickets"}},
        "spec": {
            "containers": [app, *([other] if neighbour else [])],
            "volumes": [{"name": "data", "emptyDir": {}}],
            **spec,
        },
    }
    return annotated(found, accept_loopback="true") if neighbour else found


@pytest.fixture(scope="session")
def rig(opa_bin: Path, nft_usr: Path, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """The image, what stands for the server's, and a policy builder; or why there is none."""
    try:
        with Network():
            subprocess.run(
                ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt"],
                check=True, capture_output=True, timeout=30,
            )  # fmt: skip
    except (Unavailable, OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"missing: namespaces (run as root, with ip and util-linux): {error}")
    folder = tmp_path_factory.mktemp("pods")
    (folder / "running").mkdir()
    images = {
        "sidecar": sidecar_image.image(folder / "image", opa_bin.resolve(), {"nftables": nft_usr}),
        "app": Image(
            folders={str(ROOT): ROOT},
            over_usr=() if nft_usr == sidecar_image.USR else (nft_usr,),
            env={"PYTHONPATH": str(ROOT)},
        ),
    }

    def build(policy: Path) -> Json:
        """`mcp-sidecar policy build POLICY -o configmap.yaml`"""
        target = folder / "configmap.yaml"
        subprocess.run(
            sidecar("policy", "build", policy, "-o", target),
            env=environment(opa_bin), cwd=ROOT, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        found: Json = yaml.safe_load(target.read_text("utf-8"))
        return found

    return Rig(images, build, folder / "running")


@pytest.fixture(scope="session")
def starter(rig: Rig) -> Mapping[str, str]:
    files: Mapping[str, str] = rig.build(STARTER)["data"]
    return files
