"""`webhook`: the injector as admission controllers, until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import re
from contextlib import AsyncExitStack
from pathlib import Path

from sidecar import logs
from sidecar.cli.core import stopping
from sidecar.cli.injecting import injection_of
from sidecar.config import Listen, Tls
from sidecar.errors import ConfigError
from sidecar.injector.webhook import Reviews, serve_health, serve_webhook
from sidecar.transport.tls import Listening

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")

log = logging.getLogger("sidecar")


async def webhook(options: argparse.Namespace) -> int:
    """Serve the reviews of the API server; the exit code.

    Raises:
        ConfigError: an address can not be had, or a file not be used.
    """
    logs.set_up(None, "info")
    reviews = Reviews(injection_of(options))
    context = Listening(Tls(Path(options.cert), Path(options.key)))
    stop = stopping()
    async with AsyncExitStack() as stack:
        at, health = _address("--listen", options.listen), _address("--health", options.health)
        try:
            runner, found = await serve_webhook(reviews, at.host, at.port, context)
            stack.push_async_callback(runner.cleanup)
            plain, beside = await serve_health(reviews, health.host, health.port)
            stack.push_async_callback(plain.cleanup)
        except OSError as error:
            raise ConfigError(f"an address can not be had: {error}") from error
        log.info("reviewing pods on https://%s", Listen(*found))
        log.info("/healthz and /metrics on http://%s", Listen(*beside))
        await stop.wait()
    return 0


def _address(flag: str, text: str) -> Listen:
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[2]) > 65535:
        raise ConfigError(f"{flag}: {text!r} is not HOST:PORT")
    return Listen(found[1].strip("[]"), int(found[2]))
