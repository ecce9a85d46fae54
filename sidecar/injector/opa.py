"""OPA beside the sidecar: hardened, on a socket that nobody else in the pod mounts.

Its policy is a ConfigMap that it watches, or a signed bundle that it fetches.

Source: Open Policy Agent, "Security" and `opa run --help`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidecar.injector.bundles import Bundle, Places, Revocation, settings
from sidecar.injector.injection import OPA_PORT, Injection, Json
from sidecar.injector.parts import common, field, no_token, probe, restricted
from sidecar.injector.walls import VOLUMES

SOCKET = VOLUMES + "opa"
SOCKET_FOLDER = "/run/mcp-opa"
POLICY = VOLUMES + "policy"
POLICY_FOLDER = "/policy"
PERSISTED = VOLUMES + "bundles"
TOKEN = VOLUMES + "policy-token"
AUTHORITIES = VOLUMES + "policy-ca"
AUDIENCE = "mcp-policy"

DRAIN = 12
"""Seconds that an ordered OPA goes on deciding, since all end at once; a native one ends last."""

BOOT = "/opt/mcp-opa-sidecar/boot"
"""In the image: what of OPA's policy no bundle and no ConfigMap may replace."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where OPA has its policy from."""

    arguments: list[str]
    env: list[Json]
    volumes: list[Json]
    mounts: list[Json]
    started: str  # answers with 200 when OPA has it
    patience: int  # seconds that this may take


def container(injection: Injection) -> Json:
    """OPA, as the kubelet is to run it."""
    source = _source(injection)
    return {
        **common("mcp-opa", injection),
        "command": ["opa"],
        "args": [
            "run",
            "--server",
            f"--addr=unix://{SOCKET_FOLDER}/opa.sock",
            "--unix-socket-perm=0660",
            f"--diagnostic-addr=:{OPA_PORT}",
            "--skip-version-check",
            "--log-level=error",
            "--log-format=json",
            *([] if injection.native else [f"--shutdown-wait-period={DRAIN}"]),
            *(["--authorization=basic"] if injection.opa_authorization else []),
            *source.arguments,
        ],
        "env": [{"name": "GOGC", "value": "400"}, *source.env],
        "resources": dict(injection.opa_resources),
        "startupProbe": probe(source.started, OPA_PORT, every=1, times=source.patience),
        "livenessProbe": probe("/health", OPA_PORT, every=10, times=6),
        "securityContext": restricted(injection.opa_id, injection.sidecar_id),
        "volumeMounts": [
            {"name": SOCKET, "mountPath": SOCKET_FOLDER},
            *source.mounts,
            no_token(),
        ],
    }


def volumes(injection: Injection) -> list[Json]:
    """The folder of its socket, and what its policy takes."""
    socket = {"name": SOCKET, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}
    return [socket, *_source(injection).volumes]


def stamped(injection: Injection) -> tuple[list[Json], list[Json]]:
    """Variables and mounts by which the sidecar knows the revision that OPA should serve.

    Of a bundle OPA itself says whether it has been activated, and the sidecar has no copy.
    """
    if injection.bundle is not None:
        return [], []
    stamp = {"name": "MCP_SIDECAR_POLICY__STAMP", "value": f"{POLICY_FOLDER}/data.json"}
    return [stamp], [_MOUNTED]


def _source(injection: Injection) -> Source:
    bundle = injection.bundle
    return _watched(injection.policy) if bundle is None else _fetched(bundle, injection.revocation)


_MOUNTED: Json = {"name": POLICY, "mountPath": POLICY_FOLDER, "readOnly": True}


def _watched(config_map: str) -> Source:
    return Source(
        arguments=["--ignore=.*", "--watch", BOOT, POLICY_FOLDER],
        env=[],
        volumes=[{"name": POLICY, "configMap": {"name": config_map, "defaultMode": 0o444}}],
        mounts=[_MOUNTED],
        started="/health",
        patience=60,
    )


def _fetched(bundle: Bundle, revocation: Revocation | None) -> Source:
    """Nobody is let in before each bundle was activated once, or calls would miss what is revoked.

    A restart has what was persisted, also while the server is down.
    """
    places = Places()
    token = {"audience": AUDIENCE, "expirationSeconds": 3600, "path": Path(places.token).name}
    projected = {"sources": [{"serviceAccountToken": token}], "defaultMode": 0o444}
    volumes: list[Json] = [{"name": PERSISTED, "emptyDir": {"sizeLimit": "64Mi"}}]
    mounts: list[Json] = [{"name": PERSISTED, "mountPath": places.persisted}]
    if bundle.token:
        volumes.append({"name": TOKEN, "projected": projected})
        mounts.append(_read_only(TOKEN, places.token))
    if bundle.ca is not None:
        believed = {"name": bundle.ca, "defaultMode": 0o444}
        volumes.append({"name": AUTHORITIES, "configMap": believed})
        mounts.append(_read_only(AUTHORITIES, places.ca))
    return Source(
        arguments=[*settings(bundle, revocation, places), "--bundle", BOOT],
        env=[{"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": field("metadata.namespace")}}],
        volumes=volumes,
        mounts=mounts,
        started="/health?bundles",
        patience=3600,
    )


def _read_only(volume: str, file: str) -> Json:
    return {"name": volume, "mountPath": str(Path(file).parent), "readOnly": True}
