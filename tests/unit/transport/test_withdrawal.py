"""A handler that is interrupted, and whose interruption is told from every other cancel."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.protocol.jsonrpc import Response
from sidecar.transport.withdrawal import Withdrawable, Withdrawn

REPLY = Response(1, error={"code": -31403, "message": "Denied"})


class Handler:
    """Waits in a block; says how it ended, and that nothing of it is left."""

    def __init__(self) -> None:
        self.block = Withdrawable()
        self.waits, self.undone = asyncio.Event(), False
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> Response | str | None:
        try:
            with self.block:
                try:
                    self.waits.set()
                    await asyncio.Event().wait()
                finally:
                    self.undone = True
        except Withdrawn as withdrawn:
            await asyncio.sleep(0)  # it is not cancelled any more
            return withdrawn.reply
        return "went on"


async def waiting() -> Handler:
    handler = Handler()
    await handler.waits.wait()
    return handler


async def test_a_withdrawn_call_ends_with_its_reply() -> None:
    handler = await waiting()
    await handler.block.withdraw(REPLY)
    assert await handler.task == REPLY
    assert handler.undone
    assert handler.task.cancelling() == 0


async def test_a_stream_ends_without_one_and_once() -> None:
    handler = await waiting()
    handler.block.end()
    handler.block.end()
    assert await handler.task is None


@pytest.mark.parametrize("also", [False, True])
async def test_another_cancel_goes_on(also: bool) -> None:
    handler = await waiting()
    handler.task.cancel()
    if also:
        handler.block.end()
    with pytest.raises(asyncio.CancelledError):
        await handler.task
    assert handler.undone


async def test_what_is_over_or_has_not_begun_is_not_interrupted() -> None:
    block = Withdrawable()
    block.end()
    with block:
        await asyncio.sleep(0)
    block.end()
    await asyncio.sleep(0)


async def test_an_error_of_the_block_is_its_own() -> None:
    with pytest.raises(ValueError, match="mine"), Withdrawable():
        raise ValueError("mine")
