"""What OPA's words are worth."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.opa.process import LINES_PER_MINUTE, MAX_LINE, LastWords, error_text, first_lines

ERROR = b'{"level":"error","msg":"disk on fire"}\n'
DECISION = b'{"input":{"level":"error","password":"x"},"level":"info","msg":"Decision Log"}\n'


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param(ERROR, ERROR.decode().strip(), id="error"),
        pytest.param(DECISION, None, id="decision log"),
        pytest.param(b'{"level":"warning","msg":"root"}\n', None, id="warning"),
        pytest.param(b'{"level":"error", broken\n', None, id="no JSON"),
        pytest.param(b"panic: runtime error\n", "panic: runtime error", id="crash"),
        pytest.param(b"Flag --x has been deprecated\n", None, id="deprecated flag"),
        pytest.param(b"\n", None, id="blank"),
        pytest.param(b"\xff\n", "�", id="no UTF-8"),
        pytest.param(b"x" * 5000, "x" * 1000, id="long"),
    ],
)
def test_errors_and_crashes_are_passed_on(line: bytes, text: str | None) -> None:
    assert error_text(line) == text


def test_an_error_fits_on_a_screen() -> None:
    assert first_lines("a\n\n b") == "a\n b"
    lines = first_lines("\n".join(["x" * 1000] * 50)).splitlines()
    assert (len(lines), lines[-1]) == (13, "…")
    assert len(lines[0]) == 300


async def followed(content: bytes) -> LastWords:
    stream = asyncio.StreamReader(limit=MAX_LINE)
    stream.feed_data(content)
    stream.feed_eof()
    words = LastWords()
    await words.follow(stream)
    return words


async def test_a_flood_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    words = await followed(ERROR * (LINES_PER_MINUTE + 100))
    assert len(caplog.messages) == LINES_PER_MINUTE
    assert caplog.messages[0].startswith("opa_said ")
    assert len(words.lines) == 10


async def test_a_line_that_is_too_long_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    await followed(b'{"x":"' + b"x" * 3 * MAX_LINE + b'"}\n' + ERROR)
    assert any("disk on fire" in message for message in caplog.messages)
    assert all(len(message) < 1100 for message in caplog.messages)


async def test_decisions_are_for_whoever_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    stream, taken = asyncio.StreamReader(), list[bytes]()
    logged = b'{"input":{},"msg":"Decision Log","type":"openpolicyagent.org/decision_logs"}\n'
    stream.feed_data(logged + DECISION + logged[1:])
    stream.feed_eof()
    await LastWords(taken.append).follow(stream)
    assert taken == [logged]


async def test_the_rest_of_a_torn_line_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = asyncio.StreamReader(limit=100)
    reading = asyncio.ensure_future(LastWords().follow(stream))
    stream.feed_data(b'{"x":"' + b"x" * 300)
    await asyncio.sleep(0)  # it has seen that there is too much of it
    stream.feed_data(b'SECRET"}\n')
    stream.feed_eof()
    await reading
    assert caplog.messages == []


async def test_the_end_without_a_newline_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    await followed(b"fatal error: out of memory")
    assert caplog.messages == ["opa_said fatal error: out of memory"]
