"""The API server, as the injector's own account speaks with it.

An account is a folder as the kubelet mounts it: `token`, `ca.crt` and `namespace`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidecar.api_server import ApiServer, Unreachable
from sidecar.errors import ConfigError, MalformedMessage
from sidecar.injector.injection import Json
from sidecar.protocol.jsonrpc import dump_json, parse_json

PATIENCE = 5.0
MAX_ANSWER = 4 * 1024 * 1024


class ClusterError(Exception):
    """A request that came to nothing; why, without anything that is secret."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


class Cluster:
    """Objects of the API, read and written."""

    def __init__(self, url: str, account: Path) -> None:
        self._server = ApiServer(url, account / "token", account / "ca.crt", MAX_ANSWER)

    async def get(self, path: str) -> Json | None:
        """An object; None where there is none of that name.

        Raises:
            ClusterError: it can not be had.
        """
        try:
            return await self.send("GET", path)
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    async def send(
        self, method: str, path: str, body: Json | None = None, kind: str = "application/json"
    ) -> Json:
        """What the API server answers.

        Raises:
            ClusterError: not reached, late, refused, or no object.
        """
        data = None if body is None else dump_json(body)
        try:
            async with asyncio.timeout(PATIENCE):
                status, answer = await self._server.send(method, path, data, kind)
        except TimeoutError as error:
            raise ClusterError(f"it did not answer within {PATIENCE:g} s") from error
        except Unreachable as error:
            raise ClusterError(str(error)) from error
        found = _object(answer)
        if status not in (200, 201) or not found:
            said = str(found.get("message") or "nothing else")[:300]
            raise ClusterError(f"it says {status}: {said}", status)
        return found

    async def close(self) -> None:
        """Close the connections."""
        await self._server.close()


def in_cluster(environ: Mapping[str, str]) -> str:
    """The URL of the API server of the cluster that this runs in.

    Raises:
        ConfigError: it runs in none.
    """
    host, port = (environ.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
    if not host or not port:
        raise ConfigError("--api-server has to be said outside of a cluster")
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


def _object(body: bytes) -> Json:
    try:
        found: Any = parse_json(body)
    except MalformedMessage:
        found = None
    return found if isinstance(found, dict) else {}
