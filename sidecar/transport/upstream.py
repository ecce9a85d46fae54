"""The server behind HTTP: one endpoint, kept-alive connections, nothing ever sent twice.

`send` takes a `Permitted` and nothing else. Redirects are not followed, cookies are not kept,
compressed answers are refused (nobody could judge them), and there is no limit of time on an answer
unless one is configured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict

from sidecar.errors import UpstreamError, UpstreamTimeout
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.framing import Event, EventDecoder, FrameTooLarge

CHUNK = 64 * 1024


class HttpUpstream:
    """Connections to one MCP endpoint."""

    def __init__(
        self, url: str, *, connect: float, response: float | None, message_limit: int
    ) -> None:
        self._url = url
        self._message_limit = message_limit
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=connect, sock_connect=connect, sock_read=None
        )
        self._response_timeout = response
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Make the pool; connections are opened when they are needed."""
        tracing = aiohttp.TraceConfig()
        tracing.on_request_chunk_sent.append(_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            auto_decompress=False,
            trace_configs=[tracing],
            trust_env=False,
        )

    async def stop(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def send(
        self, permitted: Permitted, headers: CIMultiDict[str], on_sent: Callable[[], None]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST a permitted message; `on_sent` is called once its bytes have left.

        Raises:
            UpstreamError: no connection, or it broke before the answer began.
            UpstreamTimeout: the answer did not begin in time.
        """
        headers = headers.copy()
        headers["Content-Type"] = "application/json"
        async with self._request("POST", headers, permitted.frame, on_sent) as response:
            yield response

    @asynccontextmanager
    async def open(
        self, verb: str, headers: CIMultiDict[str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET a stream or DELETE a session: requests that carry no message.

        Raises:
            UpstreamError: no connection, or it broke before the answer began.
        """
        async with self._request(verb, headers, None, lambda: None) as response:
            yield response

    @asynccontextmanager
    async def _request(
        self,
        verb: str,
        headers: CIMultiDict[str],
        body: bytes | None,
        on_sent: Callable[[], None],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "start() comes first"
        progress = SimpleNamespace(sent=False, on_sent=on_sent)
        try:
            response = await self._begin(verb, headers, body, progress)
        except TimeoutError as error:
            raise UpstreamTimeout(
                "the server did not answer in time", sent=progress.sent
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise UpstreamError("the server can not be reached", sent=False) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError("the connection to the server broke", sent=True) from error
        finally:
            on_sent()
        try:
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise UpstreamError("the server compressed its answer", sent=True)
            yield response
        finally:
            # What was not read to its end must not wait in the pool; closing is what a server
            # takes as the cancellation of a stateless request.
            response.close() if not response.content.at_eof() else response.release()

    async def _begin(
        self, verb: str, headers: CIMultiDict[str], body: bytes | None, progress: SimpleNamespace
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        async with asyncio.timeout(self._response_timeout):
            return await self._session.request(
                verb,
                self._url,
                headers=headers,
                data=body,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Content-Type", "Accept"),
                trace_request_ctx=progress,
            )

    async def read(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body of an answer.

        Raises:
            UpstreamError: it broke, or is larger than the bound.
        """
        parts, size = [], 0
        try:
            async for part in response.content.iter_any():
                size += len(part)
                if size > self._message_limit:
                    raise UpstreamError("the server's answer is too large", sent=True)
                parts.append(part)
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("the connection to the server broke", sent=True) from error
        return b"".join(parts)

    async def events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
        """The events of a stream, each as soon as it is whole.

        Raises:
            UpstreamError: the stream broke, or an event is larger than the bound.
        """
        decoder = EventDecoder(self._message_limit)
        try:
            async for part in response.content.iter_any():
                for event in decoder.feed(part):
                    yield event
        except (aiohttp.ClientError, OSError, FrameTooLarge) as error:
            raise UpstreamError("the stream from the server broke", sent=True) from error


async def _sent(session: object, context: SimpleNamespace, params: object) -> None:
    progress = context.trace_request_ctx
    progress.sent = True
    progress.on_sent()
