"""The one function under every face of the injector."""

from __future__ import annotations

from sidecar.injector import changes, containers, walls
from sidecar.injector.injection import Injection, Json, Namespace
from sidecar.injector.wishes import unwanted, wish_of


def plan(pod: Json, namespace: Namespace, injection: Injection) -> Json:
    """The pod as it shall be; planning that again changes nothing, and the argument is not touched.

    A pod that nobody wants injected is returned as it is. In one that is injected already, what is
    ours is taken off first, so that it comes out as `injection` says now.

    Raises:
        InjectionRefused: it can not be done, or not so that the sidecar can't be gone around.
    """
    if unwanted(pod, namespace) is not None:
        return pod
    bare = changes.restore(pod)
    wish = wish_of(bare)
    walls.refuse(bare["spec"], wish, injection)
    found, questions = changes.change(bare, wish)
    spec = found["spec"]
    ours = containers.ours(wish, questions, injection)
    # Before everybody else's, so that what later webhooks append changes no place of ours.
    kind = "initContainers" if injection.native else "containers"
    spec[kind] = [*ours, *(spec.get(kind) or ())]
    spec["volumes"] = [*containers.volumes(injection), *(spec.get("volumes") or ())]
    return found
