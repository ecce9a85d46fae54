"""OPA beside the sidecar: hardened, on a socket that nobody else in the pod mounts.

Source: Open Policy Agent, "Security" and `opa run --help`.
"""

from __future__ import annotations

from sidecar.injector.injection import OPA_PORT, Injection, Json
from sidecar.injector.parts import common, no_token, probe, restricted
from sidecar.injector.walls import VOLUMES

SOCKET = VOLUMES + "opa"
SOCKET_FOLDER = "/run/mcp-opa"
POLICY = VOLUMES + "policy"

DRAIN = 12
"""Seconds that an ordered OPA goes on deciding, since all end at once; a native one ends last."""

BOOT = "/opt/mcp-opa-sidecar/boot"
"""In the image: what of OPA's policy no bundle and no ConfigMap may replace."""


def container(injection: Injection) -> Json:
    """OPA, as the kubelet is to run it."""
    return {
        **common("mcp-opa", injection),
        "command": ["opa"],
        "args": [
            "run",
            "--server",
            f"--addr=unix://{SOCKET_FOLDER}/opa.sock",
            "--unix-socket-perm=0660",
            f"--diagnostic-addr=0.0.0.0:{OPA_PORT}",
            "--skip-version-check",
            "--log-level=error",
            "--log-format=json",
            *([] if injection.native else [f"--shutdown-wait-period={DRAIN}"]),
            *(["--authorization=basic"] if injection.opa_authorization else []),
            "--ignore=.*",
            "--watch",
            BOOT,
            "/policy",
        ],
        "env": [{"name": "GOGC", "value": "400"}],
        "resources": dict(injection.opa_resources),
        "startupProbe": probe("/health", OPA_PORT, every=1, times=60),
        "livenessProbe": probe("/health", OPA_PORT, every=10, times=6),
        "securityContext": restricted(injection.opa_id, injection.sidecar_id),
        "volumeMounts": [
            {"name": SOCKET, "mountPath": SOCKET_FOLDER},
            {"name": POLICY, "mountPath": "/policy", "readOnly": True},
            no_token(),
        ],
    }


def volumes(injection: Injection) -> list[Json]:
    """The folder of its socket, and its policy."""
    return [
        {"name": SOCKET, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": POLICY, "configMap": {"name": injection.policy, "defaultMode": 0o444}},
    ]
