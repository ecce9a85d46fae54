"""The one function under every face of the injector."""

from __future__ import annotations

from sidecar.injector import changes, containers, walls
from sidecar.injector.injection import Injection, Json, Namespace
from sidecar.injector.modes import MODES, wish_of
from sidecar.injector.wishes import unwanted


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
    mode = MODES[wish.mode]
    walls.refuse(bare["spec"], wish, injection, mode.checks)
    found, questions = changes.change(bare, wish, mode, injection)
    containers.put(found["spec"], mode, wish, questions, injection)
    return found
