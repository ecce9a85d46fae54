"""Servers as the settings know them: what their tools act on, and pins, kept up to date."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from sidecar.config import Settings
    from sidecar.conversation import Server
    from sidecar.offers import Offers
    from sidecar.protocol.pins import Pins
    from sidecar.telemetry import Series, Telemetry

log = logging.getLogger("sidecar")

POLL = 1.0
"""Seconds between looks at a file of pins; one that a symlink replaces (Kubernetes) is seen too."""


def known_server(
    settings: Settings, name: str, stack: AsyncExitStack, pins: Path | None = None
) -> Server:
    """A server of which nothing has been learned yet.

    Raises:
        ConfigError: its pins can not be read.
    """
    from sidecar.conversation import Server
    from sidecar.protocol.validation import Validation

    catalog = settings.catalog
    server = Server(
        name,
        address=_address(settings, name),
        resources=settings.resources,
        validation=Validation() if catalog.validate else None,
        refresh=catalog.refresh,
    )
    if (path := pins or catalog.pins) is not None:
        seen = _stamp(path)
        server.offers.pins = load_pins(path).digests
        watching = asyncio.get_running_loop().create_task(_watch(server.offers, path, seen))
        stack.callback(watching.cancel)
    return server


def observe(servers: Sequence[Server], traces: Telemetry) -> None:
    """Have the metrics tell what is found out of the servers' tools."""

    def by_server(read: Callable[[Offers], float | None]) -> Callable[[], Series]:
        def series() -> Series:
            found = ((each.name, read(each.offers)) for each in servers)
            return [({"authz.server": name}, value) for name, value in found if value is not None]

        return series

    traces.observe("authz.tools.unpinned", lambda: sum(s.offers.unpinned() for s in servers))
    traces.observe("authz.catalog.tools", by_server(lambda offers: offers.tools()))
    traces.observe("authz.catalog.complete", by_server(lambda offers: offers.complete()))
    traces.observe("authz.catalog.pins", by_server(_pins))
    checks = [each.validation for each in servers if each.validation is not None]
    traces.observe("authz.arguments.unchecked", lambda: sum(each.unchecked for each in checks))


def _pins(offers: Offers) -> int | None:
    return None if offers.pins is None else len(offers.pins)


def _address(settings: Settings, name: str) -> tuple[str, int] | None:
    """Where a server listens; None for a command of ours."""
    url = next((urlsplit(each.url) for each in settings.upstreams if each.name == name), None)
    if url is None or url.hostname is None:
        return None
    return url.hostname, url.port or (443 if url.scheme == "https" else 80)


def check_pins(settings: Settings) -> None:
    """Read every file of pins, to see that it can be.

    Raises:
        ConfigError: one can not.
    """
    for path in (settings.catalog.pins, *(each.pins for each in settings.upstreams)):
        if path is not None:
            load_pins(path)


def load_pins(path: Path) -> Pins:
    """The pins in a file.

    Raises:
        ConfigError: there is no such file, or it holds no pins.
    """
    from sidecar.protocol import pins

    try:
        return pins.read(path.read_bytes())
    except (OSError, ConfigError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"pins: {path}: {why}") from error


async def _watch(offers: Offers, path: Path, seen: object) -> None:
    """Take over the file whenever it changes; while it can not be read, the old pins are good."""
    while True:
        await asyncio.sleep(POLL)
        if (now := _stamp(path)) == seen:
            continue
        seen = now
        try:
            offers.pins = load_pins(path).digests
            log.info("pins: %s is in force", path)
        except ConfigError as error:
            log.error("%s; the earlier pins stay in force", error)


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
