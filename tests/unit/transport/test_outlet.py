"""What waits for one HTTP response: in order, bounded, and ended once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from sidecar.transport import outlet as module
from sidecar.transport.outlet import BOUND, COMMENT, Outlet, respond


async def rest(outlet: Outlet) -> list[bytes]:
    """Everything that is in, which has to end."""
    found = []
    while (each := await outlet.next()) is not None:
        found.append(each[0])
        if each[1]:
            break
    return found


async def test_messages_come_in_order_and_the_answer_is_the_last() -> None:
    outlet = Outlet()
    await outlet.put(b"1")
    assert outlet.offer(b"2")
    await outlet.put_answer(b"3")
    assert await outlet.next() == (b"1", False)
    assert await outlet.next() == (b"2", False)
    assert await outlet.next() == (b"3", True)


async def test_after_the_answer_nothing_is_taken_in() -> None:
    outlet = Outlet()
    outlet.finish(b"answer")
    outlet.finish(b"another one")
    await outlet.put(b"late")
    assert not outlet.offer(b"late")
    assert await rest(outlet) == [b"answer"]
    assert await outlet.next() is None


async def test_what_is_in_when_it_is_closed_is_still_written() -> None:
    outlet = Outlet()
    await outlet.put(b"1")
    outlet.close()
    assert await rest(outlet) == [b"1"]


async def test_who_waits_for_a_message_gets_it_at_once() -> None:
    outlet = Outlet()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(outlet.next())
        await asyncio.sleep(0)
        outlet.offer(b"1")
    assert waiting.result() == (b"1", False)


async def test_silence_is_told_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_ALIVE", 0.0)
    outlet = Outlet()
    with pytest.raises(TimeoutError):
        await outlet.next()
    outlet.offer(b"1")
    assert await outlet.next() == (b"1", False)


async def test_a_reader_that_is_slow_holds_up_who_writes_and_keeps_the_order() -> None:
    outlet = Outlet()
    frames = [str(number).encode() for number in range(2 * BOUND)]
    async with asyncio.TaskGroup() as group:
        writing = [group.create_task(outlet.put(each)) for each in frames]
        answering = group.create_task(outlet.put_answer(b"answer"))
        await asyncio.sleep(0)
        assert sum(each.done() for each in writing) == BOUND
        assert not outlet.offer(b"no room")
        assert await rest(outlet) == [*frames, b"answer"]
    assert answering.done()


async def test_a_reader_that_is_gone_holds_up_nobody() -> None:
    outlet = Outlet()
    async with asyncio.TaskGroup() as group:
        for number in range(3 * BOUND):
            group.create_task(outlet.put(str(number).encode()))
        await asyncio.sleep(0)
        outlet.abandon()
    assert await outlet.next() is None


async def test_an_answer_whose_writer_is_cancelled_is_there_all_the_same() -> None:
    outlet = Outlet()
    for _ in range(BOUND):
        await outlet.put(b".")
    answering = asyncio.get_running_loop().create_task(outlet.put_answer(b"answer"))
    await asyncio.sleep(0)
    answering.cancel()
    await asyncio.wait({answering})
    assert (await rest(outlet))[-1] == b"answer"


class Written(web.StreamResponse):
    """A stream that is written to memory, by a client that is gone at some point."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.data: list[bytes] = []

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing to send."""

    async def write(self, data: Any) -> None:
        if b"gone" in data:
            raise ConnectionResetError
        self.data.append(bytes(data))

    async def write_eof(self, data: Any = b"") -> None:
        self.data.append(b"end")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "StreamResponse", Written)


async def test_an_answer_alone_is_json_and_carries_the_session() -> None:
    outlet = Outlet()
    outlet.finish(b"{}")
    response = await respond(outlet, make_mocked_request("POST", "/"), {"Mcp-Session-Id": "s"})
    assert isinstance(response, web.Response)
    assert (response.body, response.content_type) == (b"{}", "application/json")
    assert response.headers["Mcp-Session-Id"] == "s"


@pytest.mark.usefixtures("written")
async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_ALIVE", 0.01)
    outlet = Outlet()
    task = asyncio.get_running_loop().create_task(
        respond(outlet, make_mocked_request("POST", "/"), {"Mcp-Session-Id": "s"})
    )
    await asyncio.sleep(0.1)
    outlet.offer(b"1")
    await outlet.put_answer(b"2")
    response = await task
    assert isinstance(response, Written)
    assert response.headers["Mcp-Session-Id"] == "s"
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.data[0] == COMMENT
    assert [each for each in response.data if each != COMMENT] == [
        b"data: 1\n\n",
        b"data: 2\n\n",
        b"end",
    ]


@pytest.mark.usefixtures("written")
async def test_a_client_that_is_gone_is_the_end_of_its_stream() -> None:
    outlet = Outlet()
    outlet.offer(b"1")
    outlet.offer(b"gone")
    outlet.finish(b"answer")
    response = await respond(outlet, make_mocked_request("POST", "/"))
    assert isinstance(response, Written)
    assert response.data == [b"data: 1\n\n"]
