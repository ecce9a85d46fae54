"""What our containers have alike.

Each satisfies the "restricted" Pod Security Standard, but for that of `redirect` which makes rules.
"""

from __future__ import annotations

from sidecar.injector.injection import Injection, Json
from sidecar.injector.walls import VOLUMES

NO_TOKEN = VOLUMES + "no-token"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def common(name: str, injection: Injection) -> Json:
    """Its name and where it comes from."""
    return {
        "name": name,
        "image": injection.image,
        "imagePullPolicy": injection.pull_policy,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def restricted(user: int, group: int) -> Json:
    """Its security context."""
    return {
        "runAsUser": user,
        "runAsGroup": group,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def probe(path: str, port: int, *, every: int, times: int) -> Json:
    """A question by HTTP, every so many seconds, that may fail so many times."""
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": every,
        "failureThreshold": times,
        "timeoutSeconds": 2,
    }


def field(path: str) -> Json:
    """What the downward API knows."""
    return {"apiVersion": "v1", "fieldPath": path}


def no_token() -> Json:
    """An empty folder where the API server would else put the account's token for us as well."""
    return {"name": NO_TOKEN, "mountPath": ACCOUNT, "readOnly": True}
