"""Callers as their server can tell them apart: by what goes on to it of each request.

Nothing of it is kept. A keyed hash stands for it, under a key that lives as long as the process.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

from sidecar.policy.identity import Actor
from sidecar.transport.headers import Headers

AUTHORIZATION = "authorization"
CREDENTIALS = frozenset({AUTHORIZATION, "cookie", "x-api-key", "api-key"})
"""Headers by which a server knows its caller."""

_KEY = secrets.token_bytes(32)


def caller_of(headers: Headers, credentials: Iterable[str], actor: Actor | None) -> bytes | None:
    """Who calls, by those of `credentials` that there are, and the actor where it is told of one.

    None is a caller that its server can not tell from others.
    """
    said = [(name, value) for name in credentials for value in headers.getall(name, ())]
    if not said and actor is None:
        return None
    known = repr((sorted(said), actor.keys if actor else ()))
    return hashlib.blake2b(known.encode("utf-8", "surrogateescape"), key=_KEY).digest()
