"""The server behind HTTP: one endpoint, kept-alive connections, nothing ever sent twice.

`send` takes a `Permitted` and nothing else. Redirects are not followed, cookies are not kept,
compressed answers are refused (nobody could judge them), and there is no limit of time on an answer
unless one is configured.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from sidecar.errors import MalformedMessage, UpstreamError, UpstreamTimeout
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.framing import Event, EventDecoder, FrameTooLarge, LineDecoder, event_of
from sidecar.protocol.jsonrpc import FROM_SERVER, Response, decode
from sidecar.transport.assertion import Assertions
from sidecar.transport.credentials import TokenFile, fits_a_header
from sidecar.transport.headers import ASSERTION

CHUNK = 64 * 1024

IDLE = 3.0
"""Seconds that a connection is kept for the next request.

Uvicorn and Node close theirs after 5. A request that meets the end of its connection can't be sent
again (it may have executed), so ours has to be the first to let go.
"""

_PLAIN = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*")
"""A reference that goes on as it is (RFC 3986); what else there is in others has to be quoted."""


class HttpUpstream:
    """Connections to one MCP endpoint."""

    def __init__(
        self,
        url: str,
        *,
        connect: float,
        response: float | None,
        message_limit: int,
        token: TokenFile | None = None,
        assertions: Assertions | None = None,
    ) -> None:
        self._url = URL(url)
        self._token = token
        self._assertions = assertions
        self._message_limit = message_limit
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=connect, sock_connect=connect, sock_read=None
        )
        self._response_timeout = response
        self._session: aiohttp.ClientSession | None = None

    def sibling(self, reference: str) -> HttpUpstream:
        """Another endpoint of the same server, once there is a pool; relative to this one.

        Raises:
            UpstreamError: it is not on the same server.
        """
        try:
            url = self._url.join(URL(reference, encoded=_PLAIN.fullmatch(reference) is not None))
            its_own = _server_of(url) == _server_of(self._url)
        except ValueError as error:
            raise UpstreamError("the server names an endpoint that is no URL", sent=True) from error
        if not its_own:
            raise UpstreamError("the server names an endpoint that is not its own", sent=True)
        other = copy.copy(self)
        other._url = url
        return other

    async def start(self) -> None:
        """Make the pool; connections are opened when they are needed."""
        tracing = aiohttp.TraceConfig()
        tracing.on_request_chunk_sent.append(_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
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
        async with self._request("POST", headers, permitted, on_sent) as response:
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
        permitted: Permitted | None,
        on_sent: Callable[[], None],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "start() comes first"
        body = None if permitted is None else permitted.frame
        headers = self._authorized(headers)
        if self._assertions is not None:
            headers = headers.copy()
            headers[ASSERTION] = self._assertions.sign(verb, permitted, body or b"")
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

    def _authorized(self, headers: CIMultiDict[str]) -> CIMultiDict[str]:
        """With the token for the server, where one is configured, in place of any other."""
        if self._token is None:
            return headers
        token = self._token.current()
        if token is None or not fits_a_header(token):
            raise UpstreamError("the token for the server can not be read", sent=False)
        headers = headers.copy()
        headers["Authorization"] = f"Bearer {token}"
        return headers

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

    async def read(self, response: aiohttp.ClientResponse, head: bytes = b"") -> bytes:
        """The whole body of an answer, of which `head` has been read.

        Raises:
            UpstreamError: it broke, or is larger than the bound.
        """
        return await self._read(response, head, lambda part: False)

    async def begin(self, response: aiohttp.ClientResponse) -> bytes:
        """What tells whether a body is lines: it goes at least to the end of the first one.

        A server that knows how long its body is does not write it while others wait for it: nothing
        is read then.

        Raises:
            UpstreamError: as `read`.
        """
        if response.content_length is not None or response.status >= 300:
            return b""
        return await self._read(response, b"", lambda part: b"\n" in part)

    async def _read(
        self, response: aiohttp.ClientResponse, head: bytes, enough: Callable[[bytes], bool]
    ) -> bytes:
        body = bytearray(head)
        try:
            async for part in response.content.iter_any():
                body += part
                if len(body) > self._message_limit:
                    raise UpstreamError("the server's answer is too large", sent=True)
                if enough(part):
                    break
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("the connection to the server broke", sent=True) from error
        return bytes(body)

    async def lines(self, response: aiohttp.ClientResponse, head: bytes) -> AsyncIterator[Event]:
        """The lines of a body that begins with `head`, each as soon as it is whole.

        Raises:
            UpstreamError: the stream broke, or a line is larger than the bound.
        """
        decoder = LineDecoder(self._message_limit)
        try:
            for line in decoder.feed(head):
                yield event_of(line)
            async for part in response.content.iter_any():
                for line in decoder.feed(part):
                    yield event_of(line)
            if (last := decoder.finish()) is not None:
                yield event_of(last)
        except (aiohttp.ClientError, OSError, FrameTooLarge) as error:
            raise UpstreamError("the stream from the server broke", sent=True) from error

    async def events(self, response: aiohttp.ClientResponse) -> AsyncGenerator[Event, None]:
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


def _server_of(url: URL) -> tuple[object, ...]:
    """Whom a request to this URL is made to, and as whom."""
    host = (url.raw_host or "").lower()
    return url.scheme, host, url.port, url.raw_user, url.raw_password


def announces(head: bytes) -> bool:
    """Whether a body begins with a line that is a message, and not the answer: more will come."""
    line, newline, _ = head.partition(b"\n")
    try:
        return bool(newline) and not isinstance(decode(line, FROM_SERVER), Response)
    except MalformedMessage:
        return False


async def _sent(session: object, context: SimpleNamespace, params: object) -> None:
    progress = context.trace_request_ctx
    progress.sent = True
    progress.on_sent()
