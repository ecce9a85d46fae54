"""What a server behind HTTP says to a pipe: the answers and events of all its streams.

An answer may be a JSON body or a stream. In the handshake revisions a stream that ends too early is
resumed where the server gave it event ids (polling, MCP 2025-11-25), and a GET stream brings what
belongs to no request. Everything goes into one queue, in the order in which it came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Literal

from aiohttp import ClientResponse

from sidecar.errors import HeaderMismatch, MalformedMessage, UnknownMethod, UpstreamError
from sidecar.protocol.catalog import Catalog, is_tool, is_well_annotated
from sidecar.protocol.framing import Event
from sidecar.protocol.jsonrpc import (
    FROM_SERVER,
    Message,
    RequestId,
    Response,
    decode,
    encode,
)
from sidecar.protocol.session import is_revision
from sidecar.transport.flight import EVENTS, Cursor, Flight, Link, key_of
from sidecar.transport.headers import SESSION
from sidecar.transport.peer import Hearer
from sidecar.transport.upstream import HttpUpstream, announces
from sidecar.transport.withdrawal import Withdrawable, Withdrawn

log = logging.getLogger("sidecar.transport.remote")

UNREAD = 64
"""Messages that wait to be read; a server that says more waits."""

LINGER = 2.0
"""Seconds that a stream may go on after its answer, or after its request was cancelled."""

RESUMPTIONS = 5
"""How often in a row a stream is resumed in vain."""


@dataclass(frozen=True, slots=True)
class Said:
    """A message, and the one line that it is."""

    message: Message
    frame: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """A request that has no answer."""

    request_id: RequestId
    error: UpstreamError


class Answers:
    """Reads responses, and keeps what was said until it is heard."""

    def __init__(self, upstream: HttpUpstream, catalog: Catalog) -> None:
        self._upstream = upstream
        self._catalog = catalog
        self.flights: dict[tuple[type, RequestId], Flight] = {}
        self.asked: dict[RequestId, asyncio.Future[Response]] = {}
        self._hearer: Hearer | None = None
        self._unheard: asyncio.Queue[Said | Lost | MalformedMessage | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(UNREAD)

    async def tell(self, hearer: Hearer) -> None:
        """Let `hearer` hear everything, until `end`."""
        self._hearer = hearer
        while (item := await self._unheard.get()) is not None:
            match item:
                case Said(message, frame):
                    self._room.release()
                    await hearer.heard(message, frame)
                case Lost(request_id, error):
                    await hearer.lost(request_id, error)
                case MalformedMessage():
                    self._room.release()
                    log.warning("dropped an event of the server that is no message: %s", item)
                    hearer.malformed(item)

    def end(self) -> None:
        """Nothing more will be said."""
        self._unheard.put_nowait(None)

    async def admits_closing(self) -> bool:
        """Whether the session may be ended."""
        return self._hearer is not None and await self._hearer.admits("close")

    def lose(self, flight: Flight, error: UpstreamError) -> None:
        """Say that a request will have no answer."""
        if flight.answered:
            return
        flight.answered = True
        own = self.asked.get(flight.request.id)
        if own is None:
            self._unheard.put_nowait(Lost(flight.request.id, error))
        elif not own.done():
            own.set_exception(error)

    def session_gone(self, link: Link) -> None:
        """The server knows the session no more: nobody will answer what was asked in it."""
        if link.gone:
            return
        log.warning("the session is gone: the server knows it no more")
        link.gone = True
        this = asyncio.current_task()
        for flight in list(self.flights.values()):
            if flight.link is link and not flight.modern:
                self.lose(flight, UpstreamError("the session is gone", sent=True))
                if flight.task is not this:
                    flight.end()
        if link.listening is not None and link.listening is not this:
            link.listening.cancel()

    # -------------------------------------------------------------- the answer to a POST

    async def receive(self, flight: Flight, response: ClientResponse) -> None:
        """Take in the response to a request.

        Raises:
            UpstreamError: it holds no answer, or breaks before.
        """
        if flight.request.method == "initialize" and response.status < 300:
            flight.link.session = response.headers.get(SESSION)
        if 300 <= response.status < 400:
            raise UpstreamError("the server redirects, which is not followed", sent=True)
        match media_type(response):
            case "text/event-stream":
                await self._read_events(flight, self._upstream.events(response))
            case "application/json":
                await self._read_json(flight, response)
            case _:
                self._refused(flight, response)

    def _refused(self, flight: Flight, response: ClientResponse) -> None:
        """A response that holds no answer."""
        if _not_found_in_session(flight, response):
            self.session_gone(flight.link)
            return
        raise UpstreamError(f"the server answered {response.status} and no message", sent=True)

    async def _read_json(self, flight: Flight, response: ClientResponse) -> None:
        """One message, or, where the body is a message a line, each as it comes."""
        head, failed = await self._upstream.begin(response), response.status >= 400
        if announces(head):
            await self._read_events(flight, self._upstream.lines(response, head))
            return
        body = await self._upstream.read(response, head)
        try:
            message = decode(body.strip(), FROM_SERVER)
        except MalformedMessage as error:
            if failed:
                self._refused(flight, response)
                return
            raise UpstreamError(f"the server's answer is no message: {error}", sent=True) from error
        if _not_found_in_session(flight, response) and not _knows_no_method(message, flight):
            self.session_gone(flight.link)
            return
        if failed and isinstance(message, Response) and not _answers(message, flight):
            message = replace(message, id=flight.request.id)  # it could not tell what it refused
            body = encode(message)
        await self._hear(message, body)
        if not flight.answered:
            raise UpstreamError("the server answered something else", sent=True)

    async def _read_events(self, flight: Flight, events: AsyncIterator[Event]) -> None:
        """Take events in as they come; a stream that goes on after its answer is closed."""
        try:
            async with asyncio.timeout(None) as patience:
                async for event in events:
                    flight.cursor.note(event)
                    await self._take(event)
                    if flight.answered and patience.when() is None:
                        patience.reschedule(asyncio.get_running_loop().time() + LINGER)
        except TimeoutError:
            return
        if not flight.answered and not flight.resumable:
            raise UpstreamError("the server ended the stream without an answer", sent=True)

    async def resume(self, flight: Flight) -> None:
        """Go on with a stream that ended before its answer.

        Raises:
            UpstreamError: the server or the policy does not let us, or it is of no use.
        """
        for failures in range(RESUMPTIONS):
            await asyncio.sleep(flight.cursor.patience(failures))
            if flight.answered:
                return
            if self._hearer is None or not await self._hearer.admits("resume"):
                raise UpstreamError("the stream may not be resumed", sent=True)
            try:
                with Withdrawable() as stream, self._hearer.holding("resume", stream.end):
                    await self._resume_once(flight)
                return
            except Withdrawn as error:
                raise UpstreamError("the stream may not be resumed", sent=True) from error
            except UpstreamError:
                if failures == RESUMPTIONS - 1:
                    raise

    async def _resume_once(self, flight: Flight) -> None:
        headers = flight.link.stream_headers(flight.cursor)
        async with self._upstream.open("GET", headers) as response:
            if _is_stream(response):
                await self._read_events(flight, self._upstream.events(response))
            else:
                self._refused(flight, response)

    # -------------------------------------------------------------- what belongs to no request

    async def listen(self, link: Link) -> None:
        """GET: keep a stream open as long as the session is, where the server has one."""
        cursor, failures = Cursor(), 0
        assert self._hearer is not None
        while await self._hearer.admits(action := _opening(cursor)):
            try:
                with Withdrawable() as stream, self._hearer.holding(action, stream.end):
                    async with self._upstream.open("GET", link.stream_headers(cursor)) as response:
                        if response.status < 500 and not _is_stream(response):
                            self._no_stream(link, response)
                            return
                        link.streamed = link.streamed or _is_stream(response)
                        failures = 0 if _is_stream(response) else failures + 1
                        await self._follow(cursor, response)
            except Withdrawn:
                return
            except UpstreamError as error:
                failures += 1
                log.debug("the server's own stream: %s", error)
            await asyncio.sleep(cursor.patience(failures))

    def _no_stream(self, link: Link, response: ClientResponse) -> None:
        """Most servers that have none say 405, but 404 is said by those that have no such route."""
        log.info("the server has no stream of its own: %d", response.status)
        if response.status == 404 and link.session is not None and link.streamed:
            self.session_gone(link)

    async def _follow(self, cursor: Cursor, response: ClientResponse) -> None:
        async for event in self._upstream.events(response):
            cursor.note(event)
            await self._take(event)

    # -------------------------------------------------------------- messages

    async def _take(self, event: Event) -> None:
        if not event.data or event.name != "message":
            return
        frame = event.data.encode("utf-8", "surrogateescape")
        try:
            message = decode(frame, FROM_SERVER)
        except MalformedMessage as error:
            await self._keep(error)
            return
        await self._hear(message, frame)

    async def _hear(self, message: Message, frame: bytes) -> None:
        heard = message
        if isinstance(message, Response):
            if message.id is not None and (flight := self.flights.get(key_of(message.id))):
                flight.answered = True
                heard = self._learn(flight, message)
            own = None if message.id is None else self.asked.get(message.id)
            if own is not None:
                if not own.done():
                    own.set_result(message)
                return
        one_line = heard is message and not (b"\n" in frame or b"\r" in frame)
        await self._keep(Said(heard, frame if one_line else encode(heard)))

    async def _keep(self, item: Said | MalformedMessage) -> None:
        await self._room.acquire()
        self._unheard.put_nowait(item)

    def _learn(self, flight: Flight, response: Response) -> Response:
        """Take from an answer what later requests need; what the client gets of it."""
        result, request = response.result, flight.request
        if request.method == "initialize" and isinstance(result, dict):
            version = result.get("protocolVersion")
            flight.link.version = version if is_revision(version) else None
        if response.error is not None and response.error["code"] == HeaderMismatch.rpc_code:
            self._catalog.forget()  # the tools are not what they were when they were listed
        if request.method == "tools/list" and flight.modern and isinstance(result, dict):
            return without_bad_annotations(response)
        return response


def without_bad_annotations(response: Response) -> Response:
    """The page less the tools whose arguments can not be repeated in headers.

    A client over HTTP must not show them (2026-07-28, tools), and here that client is the sidecar.
    """
    items = response.result.get("tools")
    items = items if isinstance(items, list) else []
    bad = [each for each in items if is_tool(each) and not is_well_annotated(each)]
    if not bad:
        return response
    log.warning("left out tools with a bad x-mcp-header: %s", [each["name"] for each in bad])
    kept = [each for each in items if each not in bad]
    return replace(response, result={**response.result, "tools": kept})


def _opening(cursor: Cursor) -> Literal["open", "resume"]:
    return "resume" if cursor.last else "open"


def media_type(response: ClientResponse) -> str:
    """What the body is said to be, without parameters."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _is_stream(response: ClientResponse) -> bool:
    return response.status == 200 and media_type(response) == EVENTS


def _not_found_in_session(flight: Flight, response: ClientResponse) -> bool:
    return response.status == 404 and not flight.modern and flight.link.session is not None


def _knows_no_method(message: Message, flight: Flight) -> bool:
    """Whether 404 is about the method, and not about the session."""
    error = message.error if isinstance(message, Response) else None
    return bool(error and error["code"] == UnknownMethod.rpc_code and _answers(message, flight))


def _answers(message: Message, flight: Flight) -> bool:
    if not isinstance(message, Response) or message.id is None:
        return False
    return key_of(message.id) == flight.key
