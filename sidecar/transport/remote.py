"""A server behind HTTP as the peer of a pipe (Streamable HTTP, MCP 2025-03-26 and later).

Each message of the client is one POST, and no POST is ever sent twice. A handshake revision has a
session: its id and revision go with every request, and it is ended with the pipe. The stateless
revision has none, but headers that repeat the body; there a request is cancelled by closing the
stream of its answer. What the server says comes in by `transport.answers`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from multidict import CIMultiDict

from sidecar.conversation import Call
from sidecar.errors import UpstreamError
from sidecar.policy.enforcement import Permitted
from sidecar.protocol.catalog import Catalog
from sidecar.protocol.jsonrpc import Message, Notification, Request, Response
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.mirror import parameter_headers, request_headers
from sidecar.protocol.session import envelope_version, is_modern
from sidecar.transport.answers import LINGER, Answers, media_type
from sidecar.transport.flight import EVENTS, JSON, Flight, Link, key_of
from sidecar.transport.peer import Ended, Hearer
from sidecar.transport.upstream import HttpUpstream

log = logging.getLogger("sidecar.transport.remote")

ACKNOWLEDGED = 2.0
"""Seconds that the next message waits until the server has acknowledged a notification."""

FAREWELL = 2.0
"""Seconds that the end of a session may take."""


class HttpPeer:
    """A `Peer` at one MCP endpoint."""

    gone = False
    sees_the_end = False

    def __init__(self, upstream: HttpUpstream, catalog: Catalog, table: MethodTable) -> None:
        self._upstream = upstream
        self._catalog = catalog
        self._table = table
        self._link = Link()
        self._answers = Answers(upstream, catalog)

    async def read(self, hearer: Hearer) -> None:
        """Let `hearer` hear what comes in on any stream, until `stop`."""
        await self._answers.tell(hearer)

    async def stop(self) -> Ended:
        """Close what is open, and end the session."""
        tasks = [each.task for each in self._answers.flights.values()] + [self._link.listening]
        open_tasks = [each for each in tasks if each is not None]
        for task in open_tasks:
            task.cancel()
        if open_tasks:
            await asyncio.wait(open_tasks)
        with suppress(TimeoutError, UpstreamError):
            async with asyncio.timeout(FAREWELL):
                await self._end_session()
        self._answers.end()
        return Ended(0, "the conversation is over")

    async def _end_session(self) -> None:
        """DELETE; a server that does not take it (405) will forget by itself."""
        link = self._link
        if link.session is None or link.gone or not await self._answers.admits_closing():
            return
        async with self._upstream.open("DELETE", link.stream_headers()) as response:
            log.info("the session was ended: %d", response.status)

    def fail_asked(self, error: UpstreamError) -> None:
        """The sidecar's own questions will not be answered."""
        for future in self._answers.asked.values():
            if not future.done():
                future.set_exception(error)

    async def ask(self, permitted: Permitted) -> Response:
        """Put the sidecar's own request to the server.

        Raises:
            UpstreamError: there will be no answer.
        """
        assert isinstance(permitted.message, Request)
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._answers.asked[permitted.message.id] = answer
        try:
            await self.send(permitted, None, _nothing)
            return await answer
        finally:
            self._answers.asked.pop(permitted.message.id, None)

    async def send(self, permitted: Permitted, call: Call | None, sent: Callable[[], None]) -> None:
        """POST a permitted message. A request is only started: its answer will be heard.

        Raises:
            UpstreamError: the session is gone, or what needs no answer did not arrive.
        """
        message = permitted.message
        if isinstance(message, Request):
            try:
                self._launch(permitted, message, call, sent)
            except BaseException:
                sent()
                raise
            return
        try:
            if not await self._closes_a_stream(message):
                await self._tell(permitted, call, sent)
        finally:
            sent()

    # -------------------------------------------------------------- requests

    def _launch(
        self, permitted: Permitted, request: Request, call: Call | None, sent: Callable[[], None]
    ) -> None:
        modern = is_modern(request)
        if modern:
            self._link.modern = envelope_version(request) or self._link.modern
        elif request.method == "initialize":
            self._begin()
        elif self._link.gone:
            raise UpstreamError("the session is gone", sent=False)
        flight = Flight(request, modern, self._link)

        def left() -> None:
            flight.left.set()
            sent()

        work = self._fly(flight, permitted, call, left)
        flight.task = asyncio.get_running_loop().create_task(work)
        self._answers.flights[flight.key] = flight
        flight.task.add_done_callback(lambda task: self._landed(flight, task, left))

    def _begin(self) -> None:
        """A handshake begins anew, also after a session that is gone."""
        if self._link.listening is not None:
            self._link.listening.cancel()
        self._link = Link(modern=self._link.modern)

    async def _fly(
        self, flight: Flight, permitted: Permitted, call: Call | None, left: Callable[[], None]
    ) -> None:
        try:
            if call is None and not flight.modern and flight.link.version is not None:
                await flight.link.greeted.wait()  # no server wants our own question any earlier
            headers = self._headers(flight.request, call)
            try:
                async with self._upstream.send(permitted, headers, left) as response:
                    await self._answers.receive(flight, response)
            except UpstreamError:
                if not flight.resumable:
                    raise
            while not flight.answered:
                await self._answers.resume(flight)
        except UpstreamError as error:
            self._answers.lose(flight, error)

    def _landed(self, flight: Flight, task: asyncio.Task[None], left: Callable[[], None]) -> None:
        left()
        if self._answers.flights.get(flight.key) is flight:
            del self._answers.flights[flight.key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an answer could not be handled", exc_info=error)
            self._answers.lose(flight, UpstreamError("the answer was not understood", sent=True))

    # -------------------------------------------------------------- what needs no answer

    async def _tell(
        self, permitted: Permitted, call: Call | None, sent: Callable[[], None]
    ) -> None:
        """POST it; the next message waits a while for the acknowledgement."""
        link, message = self._link, permitted.message
        if link.gone:
            raise UpstreamError("the session is gone", sent=False)
        patience = asyncio.get_running_loop().call_later(ACKNOWLEDGED, sent)
        try:
            headers = self._headers(message, call)
            async with self._upstream.send(permitted, headers, _nothing) as response:
                if response.status == 404 and link.session is not None:
                    self._answers.session_gone(link)
                elif response.status >= 300:
                    log.warning("a notification was answered %d", response.status)
                if media_type(response) != EVENTS:
                    await self._upstream.read(response)
        finally:
            patience.cancel()
            if isinstance(message, Notification) and message.method == "notifications/initialized":
                self._greeted(link)

    def _greeted(self, link: Link) -> None:
        link.greeted.set()
        if link.listening is None and not link.gone and link is self._link:
            work = self._answers.listen(link)
            link.listening = asyncio.get_running_loop().create_task(work)

    async def _closes_a_stream(self, message: Message) -> bool:
        """A cancel of a stateless request is the end of its connection, and no message.

        In a session it is one, and does not overtake its request, which may still be answered.
        """
        if not isinstance(message, Notification) or message.method != "notifications/cancelled":
            return False
        request_id = (message.params or {}).get("requestId")
        if not isinstance(request_id, (str, int)):
            return True
        flight = self._answers.flights.get(key_of(request_id))
        if flight is None:
            return self._link.version is None
        if flight.modern:
            flight.end()
            return True
        await flight.left.wait()
        asyncio.get_running_loop().call_later(LINGER, flight.end)
        return False

    # -------------------------------------------------------------- headers

    def _headers(self, message: Message, call: Call | None) -> CIMultiDict[str]:
        headers = CIMultiDict({"Accept": f"{JSON}, {EVENTS}", "Accept-Encoding": "identity"})
        if call is not None:
            headers.update(call.trace.to_upstream)
        if not isinstance(message, Response) and is_modern(message):
            headers.update(request_headers(message, self._table))
            if message.method == "tools/call":
                headers.update(self._parameters(message))
        elif not isinstance(message, Request) or message.method != "initialize":
            headers.update(self._link.headers())
        return headers

    def _parameters(self, message: Request | Notification) -> dict[str, str]:
        params = message.params or {}
        tool = self._catalog.look_up(str(params.get("name"))).tool
        return parameter_headers(tool.mirrors if tool else (), params.get("arguments"))


def _nothing() -> None:
    """Nobody waits for it."""
