"""The modes, by the name that a pod says: `mcp-opa-sidecar.io/mode`."""

from __future__ import annotations

from collections.abc import Mapping

from sidecar.errors import InjectionRefused
from sidecar.injector.client import CLIENT
from sidecar.injector.front import FRONT
from sidecar.injector.injection import PREFIX, Json
from sidecar.injector.mode import Mode
from sidecar.injector.redirect import REDIRECT
from sidecar.injector.stdio import MODE_STDIO
from sidecar.injector.wishes import INJECT, Wish, annotations_of, labels_of

MODES: Mapping[str, Mode] = {
    "front": FRONT,
    "redirect": REDIRECT,
    "stdio": MODE_STDIO,
    "client": CLIENT,
}

SET_BY_US = frozenset({"status"})


def wish_of(pod: Json) -> Wish:
    """What a pod that has nothing of ours in it asks for.

    Raises:
        InjectionRefused: it asks for what there is not, or does not say which server it means.
    """
    label = labels_of(pod).get(INJECT, "true")
    if label != "true":
        raise InjectionRefused(f'the label {INJECT} is {label!r}, neither "true" nor "false"')
    said = {
        name.removeprefix(PREFIX): value
        for name, value in annotations_of(pod).items()
        if name.startswith(PREFIX)
    }
    name = said.pop("mode", "front")
    if name not in MODES:
        raise InjectionRefused(f"{PREFIX}mode {name!r} is not one of: {', '.join(MODES)}")
    mode = MODES[name]
    for each in said.keys() - mode.annotations - SET_BY_US:
        known = ", ".join(sorted(mode.annotations))
        raise InjectionRefused(f"{PREFIX}{each} is no annotation of mode {name}: {known}")
    return mode.wish(pod["spec"], said)
