"""`inject`, `uninject`, `check-inject`: the injector for files, without a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from sidecar.errors import ConfigError, InjectionRefused
from sidecar.injector import manifests, workloads
from sidecar.injector.changes import restore
from sidecar.injector.injection import Injection, Json, Namespace, read
from sidecar.injector.modes import wish_of
from sidecar.injector.plan import plan
from sidecar.injector.wishes import INJECTION, unwanted

REFUSED = 1


def inject(options: argparse.Namespace) -> int:
    """Write the manifests with the sidecar in their pods; the exit code."""
    injection = injection_of(options)
    refused: list[str] = []

    def change(pod: Json, manifest: Json) -> Json:
        try:
            return plan(pod, _namespace(manifest), injection)
        except InjectionRefused as error:
            refused.append(f"{_name(manifest)}: {error}")
            return pod

    return _rewrite(options, change, refused)


def uninject(options: argparse.Namespace) -> int:
    """Write the manifests as they were before; the exit code."""
    refused: list[str] = []

    def change(pod: Json, manifest: Json) -> Json:
        try:
            return restore(pod)
        except InjectionRefused as error:
            refused.append(f"{_name(manifest)}: {error}")
            return pod

    return _rewrite(options, change, refused)


def check_inject(options: argparse.Namespace) -> int:
    """Say of each pod whether it is injected, and why; 1 when one is refused."""
    injection, found = injection_of(options), 0
    enabled = {INJECTION: "enabled"} if options.enabled else {}
    for manifest in manifests.documents(_text(options)):
        for pod, holder in workloads.pods(manifest):
            said = _why(pod, Namespace(_namespace(holder).name, enabled), injection)
            found |= said.startswith("refused")
            print(f"{_name(holder)}: {said}")
    return REFUSED if found else 0


def injection_of(options: argparse.Namespace) -> Injection:
    """The injector's settings: a file's, and the flags over them.

    Raises:
        ConfigError: with every problem.
    """
    found: Any = {}
    if options.config is not None:
        try:
            found = yaml.safe_load(Path(options.config).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config: {options.config} can not be read: {error}") from error
    if options.image is not None and isinstance(found, dict):
        found["image"] = options.image
    return read(found)


def _why(pod: Json, namespace: Namespace, injection: Injection) -> str:
    reason = unwanted(pod, namespace)
    if reason is not None:
        return f"left alone: {reason}"
    try:
        changed = plan(pod, namespace, injection) != pod
        wish = wish_of(restore(pod))
    except InjectionRefused as error:
        return f"refused: {error}"
    how = "injected" if changed else "injected already"
    return f"{how}: mode {wish.mode}, port {wish.port} of container {wish.container}"


def _rewrite(options: argparse.Namespace, change: workloads.Change, refused: list[str]) -> int:
    """Nothing is written when a pod is refused: half a stream would be applied without a guard."""
    text = manifests.rewrite(_text(options), change)
    if refused:
        raise ConfigError(refused)
    sys.stdout.write(text)
    return 0


def _namespace(manifest: Json) -> Namespace:
    """Who asks for a file to be injected wants it, unless a pod says no."""
    name = (manifest.get("metadata") or {}).get("namespace")
    return Namespace(name if isinstance(name, str) else "default", {INJECTION: "enabled"})


def _name(manifest: Json) -> str:
    name = (manifest.get("metadata") or {}).get("name")
    return f"{manifest.get('kind')}/{name}"


def _text(options: argparse.Namespace) -> str:
    try:
        if options.file == "-":
            return sys.stdin.read()
        return Path(options.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"-f: {options.file} can not be read: {error}") from error
