"""The process's own stdin and stdout as asynchronous byte streams.

Pipes, sockets and terminals are served by the event loop. Regular files can not be (epoll refuses
them, and uvloop aborts), so a thread reads or writes those.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
from typing import Protocol

CHUNK = 64 * 1024

log = logging.getLogger("sidecar.transport")


class Reader(Protocol):
    """Where bytes come from."""

    async def read(self, size: int) -> bytes:
        """At most `size` bytes; empty at the end."""


class Writer(Protocol):
    """Where bytes go to. `write` does not block; `drain` waits until there is room again."""

    def write(self, data: bytes) -> None:
        """Take `data` over."""

    async def drain(self) -> None:
        """Wait until little enough is waiting to be written."""


async def open_stdin() -> Reader:
    """The reader of the process's stdin."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK)
    if _pollable(0):
        pipe = os.fdopen(os.dup(0), "rb", buffering=0)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    else:
        threading.Thread(target=_pump, args=(loop, reader), daemon=True).start()
    return reader


async def open_stdout() -> Writer:
    """The writer of the process's stdout; nothing else may write there."""
    if not _pollable(1):
        return FileWriter(1)
    loop = asyncio.get_running_loop()
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, pipe)
    return asyncio.StreamWriter(transport, protocol, None, loop)


class FileWriter:
    """A regular file: written at once, off the loop's poller."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    async def drain(self) -> None:
        """Nothing waits."""


def _pump(loop: asyncio.AbstractEventLoop, reader: asyncio.StreamReader) -> None:
    """Feed stdin to `reader`, each chunk when the one before was taken in."""
    try:
        while data := os.read(0, CHUNK):
            _on_loop(loop, reader.feed_data, data)
        _on_loop(loop, reader.feed_eof)
    except (OSError, RuntimeError) as error:
        log.error("stdin can not be read: %s", error)


def _on_loop(loop: asyncio.AbstractEventLoop, call: object, *args: object) -> None:
    async def apply() -> None:
        assert callable(call)
        call(*args)

    asyncio.run_coroutine_threadsafe(apply(), loop).result()


def _pollable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)
