"""Processes of OPA: found, started so that they end with this one, and heard.

On Linux the kernel ends the child with the thread that forked it (`PR_SET_PDEATHSIG`), which is the
event loop's own; elsewhere a shell waits for the end of a pipe that only this process holds open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sidecar.config import Opa
from sidecar.errors import MalformedMessage, PolicyUnusable
from sidecar.protocol.jsonrpc import FROM_SERVER, parse_json

logger = logging.getLogger("sidecar.opa")

COMMAND_PATIENCE = 60.0
END_PATIENCE = 1.5
MAX_LINE = 1024 * 1024
DECISION = b'"type":"openpolicyagent.org/decision_logs"'
LINES_PER_MINUTE = 60

_ON_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1
# The shell becomes the command; what it leaves behind kills it when the pipe at its stdin ends.
_WATCHED_BY_PIPE = 'exec 3<&0; { cat <&3; kill -9 $$; } >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'


async def find_opa(settings: Opa) -> str:
    """The path of an OPA of version 1.0 or later: the configured one, else on PATH, else of `make`.

    Raises:
        PolicyUnusable: there is none.
    """
    problems = []
    for name in [settings.binary] if settings.binary else ["opa", str(settings.tools / "opa")]:
        path = shutil.which(name)
        version = await _version(path) if path else None
        if path and version and int(version.partition(".")[0]) >= 1:
            return path
        problems.append(f"{name}: {f'version {version}' if version else 'no OPA that answers'}")
    raise PolicyUnusable(
        "\n  ".join(["OPA 1.0 or later is needed, and none was found:", *problems])
        + "\nInstall `opa`, name it in MCP_SIDECAR_OPA_BIN, or run `make setup`."
    )


async def check(binary: str, folder: Path) -> None:
    """Check a policy as strictly as OPA can. `opa check` alone lets broken data pass.

    Raises:
        PolicyUnusable: with OPA's words, in which paths are relative to `folder`.
    """
    answers = await asyncio.gather(
        output((binary, "check", "--strict", "."), folder),
        output((binary, "eval", "--fail", "--format=raw", "-d", ".", "data.mcp.revision"), folder),
    )
    for code, text in answers:
        if code != 0:
            raise PolicyUnusable(f"the policy does not pass the check:\n{first_lines(text)}")


def first_lines(text: str) -> str:
    """As much of an error as fits on a screen."""
    lines = [line[:300] for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:12] + ["…"] * (len(lines) > 12))


async def spawn(command: tuple[str, ...], folder: Path) -> Process:
    """Start `command` in `folder`; its stderr is a pipe. To be called in the loop's own thread."""
    # Its own session: an interrupt from the terminal is for the sidecar, which still has calls.
    return await asyncio.create_subprocess_exec(
        *(command if _ON_LINUX else ("/bin/sh", "-c", _WATCHED_BY_PIPE, "sh", *command)),
        cwd=folder,
        stdin=DEVNULL if _ON_LINUX else PIPE,
        stdout=DEVNULL,
        stderr=PIPE,
        limit=MAX_LINE,
        start_new_session=True,
        preexec_fn=_end_with_parent() if _ON_LINUX else None,
    )


async def ended(process: Process) -> int:
    """Wait for its end; the exit code, negative for a signal."""
    code = await process.wait()
    if process.stdin is not None:  # the pipe of the shell that watches
        process.stdin.close()
    return code


async def end(process: Process) -> None:
    """Ask it to end, then see to it. It has ended on return."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(END_PATIENCE):
            await ended(process)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await ended(process)


class LastWords:
    """What OPA says on stderr: errors go to the log, at most 60 lines a minute, the rest nowhere.

    Decision logs come the same way, at another level: `decisions` takes them.
    """

    def __init__(self, decisions: Callable[[bytes], object] = lambda line: None) -> None:
        self._decisions = decisions
        self.lines: deque[str] = deque(maxlen=10)
        self._minute, self._count = 0.0, 0

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Read to the end of `stream`."""
        torn = False
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than MAX_LINE: no error of OPA's is
                torn = True
                continue
            if not line:
                return
            whole, torn = line.startswith(b"{") or not torn, False
            if line.startswith(b"{") and DECISION in line:
                self._decisions(line)
            elif whole and (text := error_text(line)):
                self._say(text)

    def _say(self, text: str) -> None:
        self.lines.append(text)
        if time.monotonic() - self._minute > 60:
            self._minute, self._count = time.monotonic(), 0
        self._count += 1
        if self._count <= LINES_PER_MINUTE:
            logger.error("opa_said %s", text)


def error_text(line: bytes) -> str | None:
    """The text of a line of OPA's that is an error or a crash, None for any other."""
    text = line.decode("utf-8", errors="replace").strip()[:1000]
    if not line.startswith(b"{"):
        return None if text.startswith("Flag --") else text or None
    if b'"level":"error"' not in line:
        return None
    with suppress(MalformedMessage):
        if parse_json(line, FROM_SERVER).get("level") == "error":
            return text
    return None


async def _version(path: str) -> str | None:
    """`1.19.1`, or None when it is no OPA that can be run."""
    with suppress(OSError, PolicyUnusable):
        _, text = await output((path, "version"), None)
        found = re.search(r"^Version:\s*v?(\d+\.\S+)", text, re.MULTILINE)
        return found[1] if found else None
    return None


async def output(command: tuple[str, ...], folder: Path | None) -> tuple[int, str]:
    """The exit code of a command that ends by itself, and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent() if _ON_LINUX else None,
    )
    try:
        async with asyncio.timeout(COMMAND_PATIENCE):
            written, _ = await process.communicate()
    except TimeoutError as error:
        message = f"`opa {command[1]}` did not end within {COMMAND_PATIENCE:g} s"
        raise PolicyUnusable(message) from error
    finally:
        if process.returncode is None:
            await end(process)
    return process.returncode or 0, written.decode("utf-8", errors="replace")


def _end_with_parent() -> Callable[[], None]:
    """For the child, between fork and exec: everything it calls is bound before the fork."""
    import ctypes

    prctl, getppid, leave = ctypes.CDLL(None).prctl, os.getppid, os._exit
    parent, kill = os.getpid(), int(signal.SIGKILL)

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, kill, 0, 0, 0)
        if getppid() != parent:  # it ended before the kernel was told
            leave(1)

    return in_child
