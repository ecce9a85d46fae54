"""AdmissionReview v1 in, AdmissionReview v1 out: what the API server asks before it stores a pod.

Which namespaces take part is told by the path that the API server was registered with: it selects
by labels, so nobody needs to look a namespace up, and an injector that is down harms no other pod.

Source: Kubernetes, "Dynamic Admission Control", `admission.k8s.io/v1`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sidecar.errors import InjectionRefused
from sidecar.injector import containers, wishes
from sidecar.injector.injection import Injection, Json, Namespace
from sidecar.injector.patch import patch
from sidecar.injector.plan import plan
from sidecar.injector.verify import verify_changed, verify_new

Outcome = Literal["injected", "unchanged", "skipped", "refused", "accepted"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API server is told, and what there is to say of it."""

    outcome: Outcome
    patch: tuple[Json, ...] = ()
    reason: str = ""

    @property
    def allowed(self) -> bool:
        """Whether the pod may be."""
        return self.outcome != "refused"


class Unreadable(ValueError):
    """Not an AdmissionReview of a pod: answered with 400, which the failure policy makes a no."""


def mutate(request: Json, enabled: bool, injection: Injection) -> Answer:
    """The mutating half: what has to be changed about a pod that is to be created."""
    pod, namespace = request["object"], _namespace(request, enabled)
    reason = wishes.unwanted(pod, namespace)
    if reason is not None:
        return Answer("skipped", reason=reason)
    planned = containers.with_ranges(plan(pod, namespace, injection), pod)
    operations = tuple(patch(pod, planned))
    return Answer("injected" if operations else "unchanged", operations)


def validate(request: Json, enabled: bool, injection: Injection) -> Answer:
    """The validating half: what is about to be stored, whoever has changed it meanwhile."""
    pod, namespace = request["object"], _namespace(request, enabled)
    if request["operation"] == "UPDATE":
        verify_changed(pod, request["oldObject"], injection)
        return Answer("accepted")
    verify_new(pod, namespace, injection)
    reason = wishes.unwanted(pod, namespace)
    return Answer("accepted") if reason is None else Answer("skipped", reason=reason)


HALVES: Mapping[str, Callable[[Json, bool, Injection], Answer]] = {
    "mutate": mutate,
    "validate": validate,
}
"""By what stands in the path."""


def review(body: Any, half: str, enabled: bool, injection: Injection) -> tuple[Json, Answer]:
    """The answer to a review, as the API server reads it and as it is counted.

    Raises:
        Unreadable: it is none.
    """
    request = _request(body)
    try:
        answer = HALVES[half](request, enabled, injection)
    except InjectionRefused as error:
        answer = Answer("refused", reason=str(error))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable("the pod is not as the API knows it") from error
    return _response(request["uid"], answer), answer


def _request(body: Any) -> Json:
    request = body.get("request") if isinstance(body, dict) else None
    if not isinstance(request, dict) or body.get("apiVersion") != "admission.k8s.io/v1":
        raise Unreadable("not an AdmissionReview of admission.k8s.io/v1")
    if not isinstance(request.get("uid"), str) or not isinstance(request.get("object"), dict):
        raise Unreadable("the review has no uid or no object")
    if (request.get("kind") or {}).get("kind") != "Pod":
        raise Unreadable("the review is not about a pod")
    return request


def _namespace(request: Json, enabled: bool) -> Namespace:
    """Pods of a ReplicaSet have no namespace of their own yet: the request has it."""
    labels = {wishes.INJECTION: "enabled"} if enabled else {}
    return Namespace(request.get("namespace") or "", labels)


def _response(uid: str, answer: Answer) -> Json:
    response: Json = {"uid": uid, "allowed": answer.allowed}
    if not answer.allowed:
        response["status"] = {"code": 403, "reason": "Forbidden", "message": answer.reason}
    if answer.patch:
        encoded = base64.b64encode(json.dumps(list(answer.patch)).encode())
        response |= {"patchType": "JSONPatch", "patch": encoded.decode()}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
