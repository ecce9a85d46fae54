"""The revision that should be in force, and whether OPA serves it: two ways to know the former."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.errors import MalformedMessage
from sidecar.protocol.jsonrpc import FROM_SERVER, parse_json

logger = logging.getLogger("sidecar.opa")

IN_FORCE_PATIENCE = 5.0
"""Seconds until a revision that passed the check has to be served."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A revision that should be served from a moment on; None: there is none to be held against."""

    revision: str | None = None
    since: float = -math.inf

    def lagging(self, served: str | None, now: float) -> bool:
        """Whether something else is served, and should not be any more."""
        return served != self.revision and now - self.since > IN_FORCE_PATIENCE


class Stamp:
    """The revision in a file of policy data that a co-located OPA reads as well.

    `policy build` writes it there (`mcp.revision`) once a policy has passed the check. Where the
    file says none, or OPA serves a policy that does not tell its own, nothing is expected.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._seen: tuple[int, ...] | None = None
        self._missing: str | None = None
        self.expected = Expected()

    def look(self) -> None:
        """Read the file again if it has changed."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_ino, found.st_size)
            if seen == self._seen:
                return
            revision = stamped(self._path.read_bytes())
            self._seen = seen
            self._expect(revision, "it says no revision (mcp.revision)")
        except OSError as error:
            self._seen = None
            self._expect(None, error.strerror or str(error))

    def lagging(self, served: str | None) -> bool:
        """Whether OPA should serve the revision by now, and does not."""
        known = served is not None and self.expected.revision is not None
        return known and self.expected.lagging(served, self._clock())

    def _expect(self, revision: str | None, why: str) -> None:
        if revision != self.expected.revision:
            self.expected = Expected(revision, self._clock())
        missing = why if revision is None else None
        if missing and missing != self._missing:
            logger.warning("policy_not_stamped file=%s why=%s", self._path, missing)
        self._missing = missing


def stamped(content: bytes) -> str | None:
    """The revision in policy data; None where there is none."""
    with suppress(MalformedMessage):
        data = parse_json(content, FROM_SERVER)
        mcp: Any = data.get("mcp") if isinstance(data, dict) else None
        revision = mcp.get("revision") if isinstance(mcp, dict) else None
        return revision if isinstance(revision, str) and revision else None
    return None
