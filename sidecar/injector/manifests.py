"""Streams of YAML manifests. A document without a change stays as it is, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import yaml

from sidecar.errors import ConfigError
from sidecar.injector.injection import Json
from sidecar.injector.workloads import Change, with_pods

_SEPARATOR = re.compile(r"(?m)^---(?=[ \t\r\n]|$)[^\n]*\n?")


class _Dumper(yaml.SafeDumper):
    """No aliases: people read the result."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def rewrite(text: str, change: Change) -> str:
    """The stream with `change` done to each pod in it.

    Raises:
        ConfigError: it is not YAML, or a manifest is not what its kind says.
        InjectionRefused: from `change`.
    """
    return "".join(_rewritten(document, change) for document in split(text))


def documents(text: str) -> Iterator[Json]:
    """Each manifest of the stream.

    Raises:
        ConfigError: it is not YAML.
    """
    for document in split(text):
        if (manifest := _read(document)) is not None:
            yield manifest


def split(text: str) -> list[str]:
    """The documents with the separators before them; joined they are the text again."""
    starts = [each.start() for each in _SEPARATOR.finditer(text)]
    bounds = sorted({0, *starts, len(text)})
    return [text[a:b] for a, b in pairwise(bounds)]


def _rewritten(document: str, change: Change) -> str:
    manifest = _read(document)
    if manifest is None:
        return document
    try:
        changed = with_pods(manifest, change)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{_name(manifest)} is not a manifest as the API knows it") from error
    if changed == manifest:
        return document
    separator = _SEPARATOR.match(document)
    head = separator[0] if separator else ""
    return head + yaml.dump(changed, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read(document: str) -> Json | None:
    try:
        found = yaml.safe_load(document)
    except yaml.YAMLError as error:
        raise ConfigError(f"the manifest is not YAML: {error}") from error
    return found if isinstance(found, dict) else None


def _name(manifest: Json) -> str:
    return f"{manifest.get('kind')} {(manifest.get('metadata') or {}).get('name')}"
