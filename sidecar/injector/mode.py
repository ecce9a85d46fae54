"""What one mode does differently from another. Everything else of a plan is the same in all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidecar.injector.injection import Injection, Json
from sidecar.injector.walls import Check
from sidecar.injector.wishes import Wish


def _nothing(wish: Wish, injection: Injection) -> list[Json]:
    return []


def _unchanged(wish: Wish) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class Program:
    """What a container's command is given to."""

    command: list[str]
    """Stands before the command."""

    mounts: list[Json]
    """What the container has to mount for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way for the sidecar to stand before a server."""

    annotations: frozenset[str]
    """What may be said of a pod in this mode, without the prefix."""

    wish: Callable[[Json, Mapping[str, str]], Wish]
    """What a pod's `spec` and annotations ask for; raises `InjectionRefused`."""

    arguments: Callable[[Wish, Injection], list[str]]
    """Of `mcp-sidecar http`: where it listens, and what is behind it."""

    told: Callable[[Wish], Mapping[str, str]] = _unchanged
    """Variables of the wished container, in the place of what it has by these names."""

    checks: tuple[Check, ...] = ()
    """What a pod may not bring in this mode, beside what it never may."""

    first: Callable[[Wish, Injection], list[Json]] = _nothing
    """Containers of ours that end before any other begins."""

    wraps: Callable[[Wish, Injection], Program] | None = None
    """What the wished container's command is given to."""

    volumes: Callable[[Wish, Injection], list[Json]] = _nothing
    """Beside those that there always are."""

    mounts: Callable[[Wish, Injection], list[Json]] = _nothing
    """Of the sidecar, beside those that it always has."""

    guarded: bool = True
    """Whether the port is the sidecar's for the kubelet too, so that its probes are moved."""
