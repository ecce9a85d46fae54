"""One question, one answer: OPA over HTTP/1.1 on a unix socket or TCP.

Whatever is not a decision is a `DecisionError` whose `detail` says which kind it is; nothing here
ever turns one into an allow. Queries may be asked twice, since asking changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import aiohttp
from yarl import URL

from sidecar.errors import (
    DecisionError,
    DecisionInvalid,
    DecisionUnavailable,
    MalformedMessage,
)
from sidecar.policy.decision import Decision, parse
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, dump_json, parse_json

MAX_ANSWER = 8 * 1024 * 1024
MAX_CONNECTIONS = 256

# OPA samples as its parent does: this parent says no, so that the sidecar's own questions leave no
# spans.
UNTRACED: Mapping[str, str] = {"traceparent": f"00-{1:032x}-{1:016x}-00"}

_DECISION = "/v1/data/mcp/authz/decision?strict-builtin-errors=true&provenance=true"
_REVISION = "/v1/data/mcp/revision"


class DecisionClient:
    """Asks the OPA at `url`: `http(s)://HOST:PORT` or `unix:///PATH`, over kept-alive HTTP/1.1.

    Made in a running loop; `close` ends its connections.
    """

    def __init__(self, url: str) -> None:
        base, connector = _connector(url)
        self._decision_url = URL(base + _DECISION, encoded=True)
        self._revision_url = URL(base + _REVISION, encoded=True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            skip_auto_headers=("User-Agent", "Accept"),
            timeout=aiohttp.ClientTimeout(),
            auto_decompress=False,
            trust_env=False,
        )

    async def decide(
        self, document: JsonObject, *, deadline: float, headers: Mapping[str, str]
    ) -> Decision:
        """What the policy says to the input `document`, within `deadline` seconds.

        Raises:
            DecisionUnavailable: `connection_error`, `timeout` or `server_error`.
            DecisionInvalid: `undefined_decision`, `evaluation_error` or `bad_response`.
        """
        body = dump_json({"input": document})
        return read_decision(await self._ask(self._decision_url, body, headers, deadline))

    async def revision(self, *, deadline: float) -> str | None:
        """What `data.mcp.revision` holds; raises as `decide`."""
        answer = await self._ask(self._revision_url, b"{}", UNTRACED, deadline)
        return _text(answer.get("result"))

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def _ask(
        self, url: URL, body: bytes, headers: Mapping[str, str], deadline: float
    ) -> JsonObject:
        try:
            async with asyncio.timeout(deadline):
                status, content = await self._exchange_twice(url, body, headers)
        except TimeoutError as error:
            message = f"OPA did not answer within {deadline:g} s"
            raise DecisionUnavailable(message, detail="timeout") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            message = f"OPA is not reached: {str(error) or type(error).__name__}"
            raise DecisionUnavailable(message, detail="connection_error") from error
        except aiohttp.ClientError as error:
            raise _bad_response("OPA's answer is not HTTP") from error
        return read_answer(status, content)

    async def _exchange_twice(
        self, url: URL, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        """Ask again, once, when a kept-alive connection turns out to be dead."""
        try:
            return await self._exchange(url, body, headers)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await self._exchange(url, body, headers)

    async def _exchange(
        self, url: URL, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        post = self._session.post(url, data=body, headers=headers, allow_redirects=False)
        async with post as response:
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise _bad_response(f"OPA's answer is longer than {MAX_ANSWER} bytes")
            return response.status, bytes(content)


def _connector(url: str) -> tuple[str, aiohttp.BaseConnector]:
    """The base URL to ask at, and what connects to it."""
    if url.startswith("unix://"):
        path = url.removeprefix("unix://")
        return "http://opa", aiohttp.UnixConnector(path, limit=MAX_CONNECTIONS)
    return url.rstrip("/"), aiohttp.TCPConnector(limit=MAX_CONNECTIONS)


def read_answer(status: int, content: bytes) -> JsonObject:
    """The body of a query's response; raises as `DecisionClient.decide`."""
    answer = _object(content)
    if status != 200:
        raise _refusal(status, answer)
    if answer is None:
        raise _bad_response("OPA's answer is not a JSON object")
    return answer


def read_decision(answer: JsonObject) -> Decision:
    """The decision in an answer; raises as `DecisionClient.decide`."""
    if "result" not in answer:
        message = "data.mcp.authz.decision is undefined"
        raise DecisionInvalid(message, detail="undefined_decision")
    return parse(
        answer["result"],
        opa_id=_text(answer.get("decision_id")),
        bundle_revision=_bundle_revision(answer.get("provenance")),
    )


def _object(content: bytes) -> JsonObject | None:
    with suppress(MalformedMessage):
        value = parse_json(content, FROM_SERVER)
        return value if isinstance(value, dict) else None
    return None


def _refusal(status: int, answer: JsonObject | None) -> DecisionError:
    """What an answer other than 200 means. It names codes and places, never values."""
    errors = answer.get("errors") if answer else None
    for each in errors if isinstance(errors, list) else ():
        code = str(each.get("code")) if isinstance(each, dict) else ""
        if status == 500 and code.startswith("eval_"):
            message = f"the policy failed: {code}{_place(each.get('location'))}"
            return DecisionInvalid(message, detail="evaluation_error")
    if status >= 500 or status == 429:
        return DecisionUnavailable(f"OPA answered {status}", detail="server_error")
    return _bad_response(f"OPA answered {status}")


def _place(location: Any) -> str:
    if not isinstance(location, dict) or "file" not in location:
        return ""
    return f" at {location['file']}:{location.get('row')}"


def _bad_response(message: str) -> DecisionInvalid:
    return DecisionInvalid(message, detail="bad_response")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _bundle_revision(provenance: Any) -> str | None:
    """The revision of OPA's bundle; `name=revision,…` when it has several."""
    if not isinstance(provenance, dict):
        return None
    bundles = provenance.get("bundles")
    if not isinstance(bundles, dict) or not bundles:
        return _text(provenance.get("revision"))
    revisions = {
        name: _text(each.get("revision")) if isinstance(each, dict) else None
        for name, each in bundles.items()
    }
    if len(revisions) == 1:
        return next(iter(revisions.values()))
    return ",".join(f"{name}={revision or ''}" for name, revision in sorted(revisions.items()))
