"""`webhook`: the injector as admission controllers, until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import re
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar import logs
from sidecar.cli.core import stopping
from sidecar.cli.injecting import injection_of
from sidecar.config import Listen, Tls
from sidecar.errors import ConfigError
from sidecar.injector.cluster import Cluster, in_cluster
from sidecar.injector.events import Events
from sidecar.injector.injection import Injection
from sidecar.injector.metrics import Metrics
from sidecar.injector.webhook import Reviews, serve_health, serve_webhook
from sidecar.transport.tls import Handed, Listening

if TYPE_CHECKING:
    from sidecar.injector.keeping import Place

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")

Work = Callable[[], Awaitable[None]]

log = logging.getLogger("sidecar")


@dataclass(frozen=True, slots=True)
class Certified:
    """Where certificates come from: the listener's context, and what can be said of them."""

    context: ssl.SSLContext
    unready: Callable[[], str | None]
    expiry: Callable[[], float]
    works: tuple[Work, ...] = ()


async def webhook(options: argparse.Namespace) -> int:
    """Serve the reviews of the API server; the exit code.

    Raises:
        ConfigError: an address can not be had, or a file not be used.
    """
    logs.set_up(None, "info")
    injection, metrics = injection_of(options), Metrics()
    async with AsyncExitStack() as stack:
        cluster = _cluster(options, injection)
        if cluster is not None:
            stack.push_async_callback(cluster.close)
        certified = _certified(options, injection, cluster, metrics)
        metrics.expires(certified.expiry)
        events = Events(cluster, metrics.event) if cluster and injection.events else None
        reviews = Reviews(injection, metrics, events.refused if events else None)
        await _served(options, reviews, certified, stack)
        works = certified.works if events is None else (*certified.works, events.run)
        await _until_stopped(works)
    return 0


async def _served(
    options: argparse.Namespace, reviews: Reviews, certified: Certified, stack: AsyncExitStack
) -> None:
    at, health = _address("--listen", options.listen), _address("--health", options.health)
    try:
        runner, found = await serve_webhook(reviews, at.host, at.port, certified.context)
        stack.push_async_callback(runner.cleanup)
        plain, beside = await serve_health(
            reviews.metrics, certified.unready, health.host, health.port
        )
        stack.push_async_callback(plain.cleanup)
    except OSError as error:
        raise ConfigError(f"an address can not be had: {error}") from error
    log.info("reviewing pods on https://%s", Listen(*found))
    log.info("/healthz, /readyz and /metrics on http://%s", Listen(*beside))


async def _until_stopped(works: tuple[Work, ...]) -> None:
    stop = stopping()
    async with asyncio.TaskGroup() as tasks:
        going = [tasks.create_task(_awaited(work)) for work in works]
        await stop.wait()
        for each in going:
            each.cancel()


async def _awaited(work: Work) -> None:
    await work()


# ── The API server ────────────────────────────────────────────────────────────────────────────────


def _cluster(options: argparse.Namespace, injection: Injection) -> Cluster | None:
    """The API server, where it is needed, and the injector has an account of its own."""
    account = Path(options.account)
    known = (account / "token").is_file()
    if options.self_signed and not known:
        raise ConfigError(f"--self-signed: {account} has no token of a service account")
    if not options.self_signed and not injection.events:
        return None
    if not known:
        log.info("no Events are sent: %s has no token of a service account", account)
        return None
    return Cluster(options.api_server or in_cluster(os.environ), account)


# ── Certificates ──────────────────────────────────────────────────────────────────────────────────


def _certified(
    options: argparse.Namespace, injection: Injection, cluster: Cluster | None, metrics: Metrics
) -> Certified:
    files = (options.cert, options.key)
    if options.self_signed and any(files):
        raise ConfigError("--self-signed makes what --cert and --key name: say one of the two")
    if options.self_signed and cluster is not None:
        return _self_signed(_place(options), injection, cluster, metrics)
    if not all(files):
        raise ConfigError("a certificate is needed: --cert and --key, or --self-signed")
    return Certified(
        Listening(Tls(Path(options.cert), Path(options.key))),
        lambda: None,
        lambda: _expiry(Path(options.cert)),
    )


def _self_signed(
    place: Place, injection: Injection, cluster: Cluster, metrics: Metrics
) -> Certified:
    from sidecar.injector.keeping import Keeper

    if not hasattr(os, "memfd_create"):
        raise ConfigError("--self-signed: this system has no files that are in memory alone")
    context, lifetimes = Handed(), injection.certificates
    keeper = Keeper(cluster, place, lifetimes, use=context.use, failed=metrics.failed)
    return Certified(context, keeper.unready, lambda: keeper.expiry, (keeper.run,))


def _place(options: argparse.Namespace) -> Place:
    from sidecar.injector.keeping import Place

    file = Path(options.account) / "namespace"
    try:
        namespace = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--account: {file} can not be read: {error}") from error
    names = ("secret", "service", "registration")
    problems = [
        f"--{name}: {getattr(options, name)!r} is not a name as the API knows it"
        for name in names
        if not _NAME.fullmatch(getattr(options, name))
    ]
    service = f"{options.service}.{namespace}.svc"
    hosts = (service, f"{service}.cluster.local", *map(_host, options.hosts))
    problems += [f"--host: {each!r} is no name" for each in hosts if not _is_host(each)]
    if problems:
        raise ConfigError(problems)
    return Place(namespace, options.secret, options.registration, hosts)


def _host(text: str) -> str:
    """As it comes back from a certificate."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text.lower()


def _is_host(text: str) -> bool:
    return ":" in text or _NAME.fullmatch(text) is not None


def _expiry(cert: Path) -> float:
    """When the certificate of a file ends, in Unix time; 0 when it can not be read."""
    from sidecar.injector.certificates import read_pem

    try:
        return read_pem(cert.read_bytes())[0].not_valid_after_utc.timestamp()
    except (OSError, ValueError, IndexError):
        return 0.0


def _address(flag: str, text: str) -> Listen:
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[2]) > 65535:
        raise ConfigError(f"{flag}: {text!r} is not HOST:PORT")
    return Listen(found[1].strip("[]"), int(found[2]))
