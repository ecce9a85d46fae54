"""Whether a pod, as somebody wants to have it, is guarded: the validating half of admission.

After the injector others may change a pod: later webhooks, and whoever may update it (images stay
mutable). So what is to be stored is planned anew, and has to contain the plan.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from sidecar.errors import InjectionRefused
from sidecar.injector import changes, walls
from sidecar.injector.containers import AMOUNTS
from sidecar.injector.injection import PREFIX, Injection, Json, Namespace
from sidecar.injector.modes import MODES, wish_of
from sidecar.injector.plan import plan
from sidecar.injector.wishes import unwanted

DEFAULTED = {
    "terminationMessagePath": "/dev/termination-log",
    "scheme": "HTTP",
    "successThreshold": 1,
    "timeoutSeconds": 1,
    "protocol": "TCP",
}
"""What the API server itself adds to what is left out."""

UNITS = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    **{unit: Fraction(1000**power) for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Fraction(1024**power) for power, unit in enumerate("KMGTPE", 1)},
}
"""Of quantities, which it writes in a way of its own: 1024Mi comes back as 1Gi."""

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")


def verify_new(pod: Json, namespace: Namespace, injection: Injection) -> None:
    """Look at a pod that is to be created.

    Raises:
        InjectionRefused: it should be injected, and is not as a plan would have it.
    """
    if unwanted(pod, namespace) is not None:
        return
    difference = _difference(_unnoted(plan(pod, namespace, injection)), _unnoted(pod), "")
    if difference is not None:
        raise InjectionRefused(f"the pod is not as the injector made it: {difference}")


def verify_changed(pod: Json, old: Json, injection: Injection) -> None:
    """Look at an update of a pod: what is ours stays, and nothing comes that leads around it.

    Raises:
        InjectionRefused: it does not.
    """
    if changes.STATUS not in _annotations(old):
        return
    for what, now, before in (
        ("containers", _containers(pod), _containers(old)),
        ("volumes", _volumes(pod), _volumes(old)),
        ("annotations", _annotations(pod), _annotations(old)),
        ("labels", _labels(pod), _labels(old)),
    ):
        if now != before:
            raise InjectionRefused(f"the sidecar's own {what} can not be changed")
    bare = changes.restore(pod)
    wish = wish_of(bare)
    walls.refuse(bare["spec"], wish, injection, MODES[wish.mode].checks)


def _unnoted(pod: Json) -> Json:
    """Without the injector's note, which says less when others have added something since."""
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    kept = {name: value for name, value in annotations.items() if name != changes.STATUS}
    return {**pod, "metadata": {**pod["metadata"], "annotations": kept}}


def _difference(expected: Any, found: Any, path: str) -> str | None:
    """Where `found` is not `expected` with the API server's defaults; None: nowhere."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if path.endswith(".resources"):
            return _in_resources(expected, found, path)
        return _in_object(expected, found, path)
    if isinstance(expected, list) and isinstance(found, list):
        return _in_list(expected, found, path)
    return None if type(expected) is type(found) and expected == found else f"{path} was changed"


def _in_object(expected: Json, found: Json, path: str) -> str | None:
    for name, value in expected.items():
        if name not in found:
            return f"{path}.{name} is missing"
        if (difference := _difference(value, found[name], f"{path}.{name}")) is not None:
            return difference
    for name in found.keys() - expected.keys():
        if DEFAULTED.get(name) != found[name]:
            return f"{path}.{name} was added"
    return None


def _in_resources(expected: Json, found: Json, path: str) -> str | None:
    """The ranges of a namespace (LimitRange) may add amounts to ours; what we ask for stays."""
    for kind in AMOUNTS:
        there = found.get(kind) or {}
        for name, amount in (expected.get(kind) or {}).items():
            if _amount(there.get(name)) != _amount(amount):
                return f"{path}.{kind}.{name} was changed"
    for name in (expected.keys() | found.keys()) - {*AMOUNTS}:
        if expected.get(name) != found.get(name):
            return f"{path}.{name} was changed"
    return None


def _amount(quantity: Any) -> Any:
    """By its worth; what is no quantity that anybody writes by hand, as it is."""
    read = _QUANTITY.fullmatch(quantity) if isinstance(quantity, str) else None
    if read is None or read[2] not in UNITS:
        return quantity
    return Fraction(read[1]) * UNITS[read[2]]


def _in_list(expected: list[Any], found: list[Any], path: str) -> str | None:
    if len(expected) != len(found):
        return f"{path} has {len(found)} entries, not {len(expected)}"
    places = enumerate(zip(expected, found, strict=True))
    differences = (_difference(a, b, f"{path}[{n}]") for n, (a, b) in places)
    return next((each for each in differences if each is not None), None)


def _containers(pod: Json) -> list[tuple[str, Json]]:
    spec = pod["spec"]
    return [
        (kind, each)
        for kind in walls.KINDS
        for each in spec.get(kind) or ()
        if each["name"] in walls.NAMES
    ]


def _volumes(pod: Json) -> list[Json]:
    return [
        each for each in pod["spec"].get("volumes") or () if each["name"].startswith(walls.VOLUMES)
    ]


def _annotations(pod: Json) -> Json:
    return _ours(pod, "annotations")


def _labels(pod: Json) -> Json:
    return _ours(pod, "labels")


def _ours(pod: Json, name: str) -> Json:
    found = (pod.get("metadata") or {}).get(name) or {}
    return {key: value for key, value in found.items() if key.startswith(PREFIX)}
