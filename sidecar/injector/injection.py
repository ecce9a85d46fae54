"""What is injected. Only the operator of the cluster chooses this: no pod can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from sidecar.config.readers import Problems, Record, a_value, number, one_of, text
from sidecar.errors import ConfigError
from sidecar.injector.bundles import BUNDLE, CONFIG_MAP, REVOCATION, Bundle, Revocation

Json = dict[str, Any]

PREFIX = "mcp-opa-sidecar.io/"

SIDECAR_PORT = 15801
ADMIN_PORT = 15820
OPA_PORT = 15821
"""OPA's `/health` and `/metrics`, for the kubelet, which can not ask a socket."""

RESERVED_PORTS = frozenset({SIDECAR_PORT, ADMIN_PORT, OPA_PORT})


@dataclass(frozen=True, slots=True)
class Namespace:
    """What counts of the namespace that a pod is to live in."""

    name: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Of certificates that the injector makes itself, in seconds."""

    authority: float = 365 * DAY
    leaf: float = 30 * DAY  # another one is made after two thirds of it
    overlap: float = DAY  # for how long an authority is believed before it signs
    look: float = 60.0  # how often each replica looks, if nothing is wrong

    def __post_init__(self) -> None:
        if 3 * (self.leaf + self.overlap) > self.authority:
            raise ValueError("authority has to be three times leaf and overlap together")
        if 6 * self.look > self.leaf or 2 * self.look > self.overlap:
            raise ValueError("look has to be at most half of overlap, and a sixth of leaf")


def _resources(cpu: str, memory: str, most: str) -> Json:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": most}}


@dataclass(frozen=True, slots=True)
class Injection:
    """The settings of the injector, field by field."""

    image: str = "mcp-opa-sidecar:latest"  # sidecar and OPA; by digest in production
    pull_policy: str = "IfNotPresent"
    native: bool = True  # native sidecars (every node 1.29 or later), else ordered containers
    pause: int = 5  # seconds that ordered ones go on at a pod's end, until Services let go of it
    sidecar_id: int = 20001  # uid and gid; of nobody else in the pod
    opa_id: int = 20002  # uid; its gid is the sidecar's, which so can use its socket
    # OPA asks `system.authz` about each request: a second wall. Off, since its socket is the
    # sidecar's alone, and a decision would cost it a third more CPU (0.7 ms to 0.93: measured).
    opa_authorization: bool = False
    policy: str = "mcp-policy"  # ConfigMap of the pod's namespace, as `policy build` writes it
    bundle: Bundle | None = None  # the policy, in place of the ConfigMap
    revocation: Revocation | None = None  # beside the bundle: what is revoked, looked at more often
    config: str | None = None  # ConfigMap of the pod's namespace with the sidecar's `config.yaml`
    otlp: str | None = None  # base URL of the collector
    events: bool = True  # about refused pods, where the injector may speak with the API server
    certificates: Lifetimes = Lifetimes()  # of those that it makes itself
    sidecar_resources: Mapping[str, Any] = field(
        default_factory=lambda: _resources("50m", "96Mi", "384Mi")
    )
    opa_resources: Mapping[str, Any] = field(
        default_factory=lambda: _resources("50m", "64Mi", "256Mi")
    )

    def __post_init__(self) -> None:
        if self.sidecar_id == self.opa_id:
            raise ValueError(
                "sidecar_id and opa_id have to differ: OPA's socket is not the server's"
            )
        if self.revocation is not None and self.bundle is None:
            raise ValueError(
                "revocation: is a bundle beside that of the policy (bundle); where OPA watches a"
                " ConfigMap, an edit of that would erase what a bundle has brought"
            )


def read(document: Any) -> Injection:
    """The settings of a file: a mapping of the fields above, each as its default is.

    Raises:
        ConfigError: with every problem at once.
    """
    problems = Problems()
    found = problems.read(FIELDS, {} if document is None else document, "")
    if found is None:
        said = [(where.lstrip("."), bad) for where, bad in problems]
        raise ConfigError([f"{where}: {bad}" if where else str(bad) for where, bad in said])
    return cast("Injection", found)


_QUANTITY = r"[0-9]+(\.[0-9]+)?([EPTGMK]i|[EPTGMkmun])?"

_seconds = number(1, 3660 * DAY, int, float)
_id = number(1, 2**31 - 1, int)
_flag = a_value("true or false", lambda value: isinstance(value, bool))
_quantity = text("a quantity such as 50m or 96Mi", _QUANTITY)
_amounts = Record({"cpu": _quantity, "memory": _quantity}, (), dict)
_limits = Record({"requests": _amounts, "limits": _amounts}, (), dict)

FIELDS = Record(
    {
        "image": text("an image, with a tag or digest", r"[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,511}"),
        "pull_policy": one_of("Always", "IfNotPresent", "Never"),
        "native": _flag,
        "pause": number(0, 300, int),
        "sidecar_id": _id,
        "opa_id": _id,
        "opa_authorization": _flag,
        "policy": CONFIG_MAP,
        "bundle": BUNDLE,
        "revocation": REVOCATION,
        "config": CONFIG_MAP,
        "otlp": text("an http(s) URL", r"https?://[^\s\"']{1,512}"),
        "events": _flag,
        "certificates": Record(
            dict.fromkeys(("authority", "leaf", "overlap", "look"), _seconds), (), Lifetimes
        ),
        "sidecar_resources": _limits,
        "opa_resources": _limits,
    },
    (),
    Injection,
)
"""What each field may be."""
