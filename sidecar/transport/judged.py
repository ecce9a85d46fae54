"""What a client gets of an event of its server's: each message is judged for itself."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from sidecar.errors import ProtocolError
from sidecar.pipeline import Pipeline
from sidecar.policy.enforcement import AnswerServer, Deliver, Delivery, Permitted
from sidecar.protocol.framing import Event, encode_event
from sidecar.protocol.jsonrpc import FROM_SERVER, Message, decode, encode
from sidecar.transport.exchange import Frame

log = logging.getLogger("sidecar.transport")

Hear = Callable[[Message], Awaitable[Delivery]]
"""Who says what becomes of a message of the server."""

Answer = Callable[[Permitted], Awaitable[None]]
"""A way to answer the server in place of its client."""


async def judged(
    event: Event, pipeline: Pipeline, hear: Hear, answer: Answer, frame: Frame = encode_event
) -> bytes:
    """The bytes that the client gets for an event; none when it is dropped."""
    if not event.data:
        return event.raw
    try:
        message = decode(event.data.encode("utf-8", "surrogateescape"), FROM_SERVER)
        delivery = await hear(message)
    except ProtocolError as error:
        log.warning("dropped an event of the server that is no message: %s", error)
        pipeline.malformed(error)
        return b""
    match delivery:
        case Deliver(None):
            return event.raw
        case Deliver(replaced) if replaced is not None:
            return frame(encode(replaced), event)
        case AnswerServer(permitted):
            await answer(permitted)
            return b""
        case _:
            return b""
