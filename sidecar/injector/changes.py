"""What is changed of others' things in a pod, and how it is taken back.

What can't be planned anew (the original of a probe, of a variable) is kept in an annotation. That
is a note and no evidence: whatever it says, what comes of it is planned anew and compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from sidecar.errors import InjectionRefused, MalformedMessage
from sidecar.injector import probes
from sidecar.injector.injection import PREFIX, Injection, Json
from sidecar.injector.mode import Mode, Program
from sidecar.injector.walls import NAMES, VOLUMES
from sidecar.injector.wishes import Wish
from sidecar.protocol.jsonrpc import parse_json

STATUS = PREFIX + "status"
INJECTED = PREFIX + "injected"
DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"

IN_METADATA = "annotations", "labels"
IN_SPEC = "initContainers", "volumes"

WRAPPED = "command", "args", "volumeMounts"
"""What is changed of a container whose command is given to a program."""

ABSENT = "absent"


def restore(pod: Json) -> Json:
    """The pod without what is ours; itself when it does not claim to have any.

    Raises:
        InjectionRefused: it claims so in words that are not ours.
    """
    text = ((pod.get("metadata") or {}).get("annotations") or {}).get(STATUS)
    if text is None:
        return pod
    note = _read(text)
    found = deepcopy(pod)
    spec, metadata = found["spec"], found["metadata"]
    _take_off(spec)
    for each in _containers(spec):
        _restore_container(each, note["containers"].get(each["name"]) or {})
    del metadata["annotations"][STATUS]
    (metadata.get("labels") or {}).pop(INJECTED, None)
    if note["default_container"]:
        metadata["annotations"].pop(DEFAULT_CONTAINER, None)
    for holder, names in ((metadata, IN_METADATA), (spec, IN_SPEC), (found, ("metadata",))):
        for name in names:
            _empty_again(holder, name, note["empty"])
    return found


def change(pod: Json, wish: Wish, mode: Mode, injection: Injection) -> tuple[Json, Json]:
    """Tell the wished container what the mode has to say, and the kubelet to ask the sidecar.

    The changed pod, which is the caller's, and the probes that the sidecar is to make, by their
    paths.

    Raises:
        InjectionRefused: a probe or hook can't be moved.
    """
    found, questions = deepcopy(pod), {}
    spec, metadata = found["spec"], found.get("metadata") or {}
    empty = _empties(found, ("metadata",)) | _empties(metadata, IN_METADATA)
    empty |= _empties(spec, IN_SPEC)
    found["metadata"] = metadata
    undone = {}
    for container in _containers(spec):
        undo, asked = _change_container(container, wish, mode, injection)
        questions.update(asked)
        if undo:
            undone[container["name"]] = undo
    annotations = metadata["annotations"] = dict(metadata.get("annotations") or {})
    metadata["labels"] = {**(metadata.get("labels") or {}), INJECTED: "true"}
    note = {
        "version": 1,
        "mode": wish.mode,
        "port": wish.port,
        "containers": undone,
        "default_container": DEFAULT_CONTAINER not in annotations,
        "empty": empty,
    }
    annotations.setdefault(DEFAULT_CONTAINER, wish.container)
    annotations[STATUS] = json.dumps(note, separators=(",", ":"), sort_keys=True)
    return found, questions


def _change_container(
    container: Json, wish: Wish, mode: Mode, injection: Injection
) -> tuple[Json, Json]:
    undo: Json = {}
    questions: Json = _move_probes(container, wish.port, undo) if mode.guarded else {}
    if container["name"] != wish.container:
        return undo, questions
    if told := mode.told(wish):
        undo["env"] = _tell(container, told)
    if mode.wraps is not None:
        undo["wrapped"] = _wrap(container, wish.command, mode.wraps(wish, injection))
    return undo, questions


def _wrap(container: Json, command: tuple[str, ...], program: Program) -> Json:
    """Give the command to a program; of what follows that, how many words were the command."""
    words = container.get("command") or [*command]
    before: Json = {"words": len(words), "empty": _empties(container, WRAPPED)}
    container["command"] = program.command
    container["args"] = [*words, *(container.get("args") or ())]
    container["volumeMounts"] = [*program.mounts, *(container.get("volumeMounts") or ())]
    return before


def _unwrap(container: Json, before: Json) -> None:
    words, count, empty = container.get("args") or [], before["words"], before["empty"]
    mounts = container.get("volumeMounts") or ()
    container["command"] = [] if "command" in empty else words[:count]
    container["args"] = words[count:]
    container["volumeMounts"] = [each for each in mounts if not each["name"].startswith(VOLUMES)]
    for name in WRAPPED:
        _empty_again(container, name, empty)


def _move_probes(container: Json, port: int, undo: Json) -> Json:
    questions: Json = {}
    probes.refuse_hooks(container, port)
    for kind in probes.KINDS:
        instead = probes.moved(container, kind, port)
        if instead is not None:
            path = probes.path_of(container["name"], kind)
            questions[path] = probes.question(container, kind, port)
            undo.setdefault("probes", {})[kind] = container[kind]
            container[kind] = instead
    return questions


def _tell(container: Json, told: Mapping[str, str]) -> Json:
    """Set variables; what they were before: None for those that were not there."""
    before: Json = {"empty": _empties(container, ("env",)), "variables": {}}
    entries = list(container.get("env") or ())
    there = {each["name"]: each for each in entries}
    said = {name: {"name": name, "value": value} for name, value in told.items()}
    before["variables"] = {name: there.get(name) for name in said}
    new = [each for name, each in said.items() if name not in there]
    container["env"] = [*new, *(said.get(each["name"], each) for each in entries)]
    return before


def _restore_container(container: Json, undo: Json) -> None:
    for kind, probe in (undo.get("probes") or {}).items():
        if kind in probes.KINDS:
            container[kind] = probe
    if "wrapped" in undo:
        _unwrap(container, undo["wrapped"])
    env = undo.get("env")
    if not env:
        return
    before = env["variables"]
    entries = [before.get(each["name"], each) for each in container.get("env") or ()]
    container["env"] = [each for each in entries if each is not None]
    _empty_again(container, "env", env["empty"])


def _take_off(spec: Json) -> None:
    """What is ours by its name; a name of ours is nobody else's."""
    for kind in ("initContainers", "containers"):
        if kind in spec:
            spec[kind] = [each for each in spec[kind] or () if each["name"] not in NAMES]
    if "volumes" in spec:
        kept = [each for each in spec["volumes"] or () if not each["name"].startswith(VOLUMES)]
        spec["volumes"] = kept


def _containers(spec: Json) -> list[Json]:
    return [*(spec.get("initContainers") or ()), *spec["containers"]]


def _empties(holder: Json, names: tuple[str, ...]) -> Json:
    """Those of the names that hold nothing: with their value, or as `ABSENT`."""
    return {name: holder.get(name, ABSENT) for name in names if not holder.get(name)}


def _empty_again(holder: Json, name: str, empty: Json) -> None:
    if name not in empty or holder.get(name):
        return
    if empty[name] == ABSENT:
        holder.pop(name, None)
    else:
        holder[name] = empty[name]


def _read(text: str) -> Json:
    """The note of an annotation, as far as it is read."""
    try:
        note = parse_json(text.encode())
        if not isinstance(note, dict) or not _is_note(note):
            raise TypeError
    except (MalformedMessage, UnicodeEncodeError, TypeError, KeyError, AttributeError) as error:
        raise InjectionRefused(f"{STATUS} is not what the injector wrote") from error
    return note


def _is_note(note: Any) -> bool:
    if note["version"] != 1 or not isinstance(note["default_container"], bool):
        return False
    entries: list[Any] = []
    empties, counts = [*note["empty"].values()], list[Any]()
    for undo in note["containers"].values():
        if "env" in undo:
            entries += [each for each in undo["env"]["variables"].values() if each is not None]
            empties += undo["env"]["empty"].values()
        if "wrapped" in undo:
            empties += undo["wrapped"]["empty"].values()
            counts.append(undo["wrapped"]["words"])
        entries += undo.get("probes", {}).values()
    if not all(type(each) is int and each >= 0 for each in counts):
        return False
    return all(isinstance(each, dict) for each in entries) and all(
        each in (ABSENT, None, [], {}) for each in empties
    )
