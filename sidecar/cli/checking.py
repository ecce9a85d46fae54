"""`mcp-sidecar check`: configuration, policy and OPA, before anything is deployed."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from sidecar import __version__
from sidecar.cli.catalogs import check_pins
from sidecar.cli.core import own_opa
from sidecar.errors import ConfigError, PolicyUnusable

if TYPE_CHECKING:
    from sidecar.config import Settings


async def check(settings: Settings, *, show: bool = True, online: bool = False) -> int:
    """Start what there is, ask it one question, and show what would be in force.

    `online` also asks every issuer for its keys.
    """
    from sidecar import config
    from sidecar.transport.tls import check as check_tls

    check_pins(settings)
    check_tls(settings)
    if settings.assertion is not None:
        from sidecar.transport.assertion import read_key

        read_key(settings.assertion.key)
    if online:
        await _fetch_keys(settings)
    revision = await _asked_once(settings)
    if not show:
        return 0
    print(json.dumps(config.describe(settings), indent=2))
    print(f"fine: OPA decides, policy revision {revision or '(none)'}", file=sys.stderr)
    return 0


async def _fetch_keys(settings: Settings) -> None:
    """Have the keys of every issuer.

    Raises:
        ConfigError: some can not be had; it says which, and why.
    """
    from sidecar.keys import Authenticator

    authenticator = Authenticator(settings.identity.issuers)
    try:
        await authenticator.warm()
    finally:
        await authenticator.close()
    failed = {name: keys.refreshes.problem for name, keys in authenticator.keys.items()}
    problems = [
        f"identity: the keys of {name} can not be had: {why}" for name, why in failed.items() if why
    ]
    if problems:
        raise ConfigError(problems)
    print(f"fine: the keys of {', '.join(failed) or 'no issuer'}", file=sys.stderr)


async def _asked_once(settings: Settings) -> str | None:
    """Ask OPA the canary question; the revision that it decides by.

    Raises:
        PolicyUnusable: OPA can not be started, or gives no decision.
    """
    from sidecar import opa
    from sidecar.errors import DecisionError

    async with AsyncExitStack() as stack:
        own = await own_opa(settings, stack)
        decider = opa.DecisionClient(own.url if own else str(settings.opa.url))
        stack.push_async_callback(decider.close)
        question = opa.question(enforcer_version=__version__, server="check", transport="http")
        try:
            decision = await decider.decide(question, deadline=settings.opa.deadline, headers={})
        except DecisionError as error:
            raise PolicyUnusable(f"OPA gives no decision: {error} ({error.detail})") from error
    return decision.revision
