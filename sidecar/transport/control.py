"""The control socket: for operators on this machine, who may see decisions.

HTTP on a unix socket. Only its owner and root get in, three times over: nobody else can write in
the folder, the socket is 0600, and the kernel says who connects (`SO_PEERCRED`).

    GET /v1/decisions?actor=GLOB&tool=GLOB&decision=WORD&last=N    records, a JSON line each, live
"""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

from aiohttp import web

from sidecar.errors import ConfigError, Overloaded

log = logging.getLogger("sidecar.control")

MODE, FOLDER_MODE = 0o600, 0o700
MAX_PATH = 103
"""Bytes of a socket's path that every system takes."""
PARAMETERS = {"actor", "tool", "decision"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Decisions(Protocol):
    """Who tells of decisions."""

    def listen(self, *, last: int, **wanted: str) -> AbstractContextManager[AsyncIterator[bytes]]:
        """Lines, from the last so many on. Raises Overloaded."""

    def close(self) -> None:
        """End what is being told."""


@asynccontextmanager
async def serving(path: Path, decisions: Decisions) -> AsyncIterator[None]:
    """Serve the control API at `path` for as long as the block lasts, then remove the socket.

    Raises:
        ConfigError: the socket can not be made, or not safely.
    """
    listening = bind(path)
    remove = _remover(path)
    runner = web.AppRunner(
        _application(decisions),
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # who hangs up is listened for no more
        shutdown_timeout=0.5,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        log.info("control on %s", path)
        yield
    finally:
        decisions.close()
        await runner.cleanup()
        listening.close()
        remove()


def bind(path: Path) -> socket.socket:
    """A socket at `path` that only its owner can connect to, in the place of one left behind.

    Raises:
        ConfigError: something else is there, somebody listens, or others can write in the folder.
    """
    if len(os.fsencode(path.absolute())) > MAX_PATH:
        raise ConfigError(f"control: a socket's path has at most {MAX_PATH} bytes: {path}")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _private(path.parent)
        _make_room(path)
        bound.bind(str(path))
        path.chmod(MODE)  # before it listens: until then nobody can connect
    except OSError as error:
        bound.close()
        why = error.strerror or error
        raise ConfigError(f"control: can not listen on {path}: {why}") from error
    except ConfigError:
        bound.close()
        raise
    return bound


def _private(folder: Path) -> None:
    """See to a folder in which nobody else can put a socket of theirs in the place of ours."""
    with suppress(FileExistsError):
        folder.mkdir(mode=FOLDER_MODE)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"control: {folder} is no folder (a symlink is not followed)")
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022:
        raise ConfigError(
            f"control: others can write in {folder}; name a folder of your own, such as one below "
            f"it that is not there yet: {folder / 'control' / 'control.sock'}"
        )


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on; nothing else is ever removed."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"control: {path} is there, and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        with suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise ConfigError(f"control: another process listens on {path}")
    path.unlink()


def _remover(path: Path) -> Callable[[], None]:
    """What removes the socket that is at `path` now, and none that is put there later."""
    made = path.lstat()

    def remove() -> None:
        with suppress(OSError):
            if os.path.samestat(path.lstat(), made):
                path.unlink()

    return remove


def _application(decisions: Decisions) -> web.Application:
    application = web.Application(middlewares=[_owner_only], client_max_size=0)
    application.router.add_get("/v1/decisions", _telling(decisions), allow_head=False)
    return application


@web.middleware
async def _owner_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    uid = peer_uid(request.get_extra_info("socket"))
    if uid in (os.geteuid(), 0):
        return await handler(request)
    log.warning("refused user %d on the control socket", uid)
    return web.Response(status=403, text="for the user that runs the sidecar, and root\n")


def peer_uid(connection: socket.socket | None) -> int:
    """The user at the other end; where the system does not say, the socket's mode has said it."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()
    if connection is None:  # it is gone
        return -1
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", found)[1]
    return uid


def _telling(decisions: Decisions) -> Handler:
    async def tell(request: web.Request) -> web.StreamResponse:
        asked = dict(request.query)
        last = asked.pop("last", "0")
        if asked.keys() - PARAMETERS or not re.fullmatch("[0-9]{1,3}", last):
            text = f"parameters: {', '.join(sorted(PARAMETERS))}, last (0 to 999)\n"
            return web.Response(status=400, text=text)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        try:
            with decisions.listen(last=int(last), **asked) as lines:
                await response.prepare(request)
                async for some in lines:
                    await response.write(some)
        except Overloaded as error:
            return web.Response(status=503, text=f"{error}\n")
        return response

    return tell
