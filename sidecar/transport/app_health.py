"""The kubelet's questions to a server that answers on loopback only: the sidecar asks them for it.

A kubelet dials the pod's address, where the sidecar is. So the injector has it ask the admin port,
by a path for each probe, and tells the sidecar what to ask of the server instead.

Source: Kubernetes, "Configure Liveness, Readiness and Startup Probes": from 200 to 399 is well, and
certificates are not looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from sidecar.config.readers import Problems, Record, a_value, mapping, number, one_of, text
from sidecar.errors import ConfigError, MalformedMessage
from sidecar.protocol.jsonrpc import parse_json

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class AppProbe:
    """A question to the server."""

    port: int
    seconds: float = 1.0  # that the answer may take
    path: str | None = None  # what is asked by HTTP; None: a connection is all that is asked
    scheme: str = "HTTP"  # or HTTPS
    headers: tuple[tuple[str, str], ...] = ()


def read_probes(said: str | None) -> Mapping[str, AppProbe]:
    """The probes by their path at the admin port, from the JSON that the injector has written.

    Raises:
        ConfigError: it is something else.
    """
    if not said:
        return {}
    problems = Problems()
    try:
        found = problems.read(mapping, parse_json(said.encode()), "all")
    except MalformedMessage as error:
        raise ConfigError(f"POD_APP_PROBES: {error}") from error
    probes = {path: problems.read(_PROBE, probe, path) for path, probe in (found or {}).items()}
    if problems:
        raise ConfigError([f"POD_APP_PROBES: {where}: {bad}" for where, bad in problems])
    return cast("Mapping[str, AppProbe]", probes)


async def is_well(probe: AppProbe) -> bool:
    """Whether the server answers as the kubelet would have it."""
    with suppress(OSError, ClientError, TimeoutError, ValueError):
        async with asyncio.timeout(probe.seconds):
            return await (_connects(probe) if probe.path is None else _answers(probe))
    return False


async def _connects(probe: AppProbe) -> bool:
    _, writer = await asyncio.open_connection(LOOPBACK, probe.port)
    writer.close()
    return True


async def _answers(probe: AppProbe) -> bool:
    path = "/" + (probe.path or "").lstrip("/")
    url = f"{probe.scheme.lower()}://{LOOPBACK}:{probe.port}{path}"
    connector = TCPConnector(ssl=False, force_close=True)
    timeout = ClientTimeout(total=None)
    async with (
        ClientSession(connector=connector, timeout=timeout) as session,
        session.get(url, headers=probe.headers, allow_redirects=False) as response,
    ):
        return 200 <= response.status < 400


def _headers(value: Any) -> tuple[tuple[str, str], ...]:
    pair = a_value("a name and a value", lambda each: isinstance(each, list) and len(each) == 2)
    pairs = a_value("a list of pairs", lambda each: isinstance(each, list))(value)
    name, line = text("the name of a header", r"[A-Za-z0-9-]+"), text("a line", r"[^\r\n]*")
    return tuple((name(pair(each)[0]), line(each[1])) for each in pairs)


_PROBE = Record(
    {
        "port": number(1, 65535, int),
        "seconds": number(0.1, 3600, int, float),
        "path": text("a path", r"[^\s]*"),
        "scheme": one_of("HTTP", "HTTPS"),
        "headers": _headers,
    },
    ("port",),
    AppProbe,
)
