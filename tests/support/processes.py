"""Processes of a test: started, waited for by what they say, and ended by their own id.

Every helper is a context manager, so that a test that fails leaves nothing behind. What a process
writes to stderr is read as it comes, and shown when something goes wrong.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "policies" / "starter"
ALLOW_ALL = ROOT / "policies" / "allow_all"
DENY_ALL = ROOT / "policies" / "deny_all"
START = 30.0
LISTENING = r'listening on (https?://[^\s"]+)'
ADMIN = r'admin on (http://[^\s"]+)'

Value = TypeVar("Value")


def sidecar(*arguments: str | Path) -> list[str]:
    """The command line of the sidecar."""
    return [sys.executable, "-m", "sidecar", *map(str, arguments)]


def desk(log: Path, *arguments: str) -> list[str]:
    """The command line of the ticket desk."""
    return [sys.executable, "-m", "tests.support.ticket_desk", "--log", str(log), *arguments]


def environment(opa: Path | None = None, **more: str) -> dict[str, str]:
    """This environment without anybody's settings for the sidecar or for OpenTelemetry."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MCP_SIDECAR_", "OTEL_")) or name == "MCP_SIDECAR_OPA_BIN"
    }
    return {**kept, **({"MCP_SIDECAR_OPA_BIN": str(opa)} if opa else {}), **more}


def patient(opa: Path) -> dict[str, str]:
    """For tests of what is decided, not of how soon: a machine that is busy changes nothing."""
    seconds = ("LIMITS__CATALOG", "POLICY__DEADLINE", "POLICY__LISTING_DEADLINE")
    return environment(opa, **{f"MCP_SIDECAR_{name}": "20" for name in seconds})


def wait_until(condition: Callable[[], Value], what: str, timeout: float = START) -> Value:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(0.01)
    return value


def wait_for_line(file: Path, pattern: str, timeout: float = START) -> re.Match[str]:
    """The first match in a file that somebody else writes, such as the log of a client's server."""

    def look() -> re.Match[str] | None:
        return re.search(pattern, file.read_text(encoding="utf-8")) if file.exists() else None

    found = wait_until(look, f"{pattern!r} in {file}", timeout)
    assert found is not None
    return found


class Process:
    """A process of ours. A thread reads its stderr; stdin and stdout are pipes if asked for."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        pipes: bool = False,
    ) -> None:
        stream = subprocess.PIPE if pipes else subprocess.DEVNULL
        self._popen = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=dict(env if env is not None else environment()),
            stdin=stream,
            stdout=stream,
            stderr=subprocess.PIPE,
        )
        self.command, self._lines, self._news = command, list[str](), threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stdin(self) -> Any:
        return self._popen.stdin

    @property
    def stdout(self) -> Any:
        return self._popen.stdout

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    @property
    def lines(self) -> list[str]:
        """What it wrote to stderr so far."""
        with self._news:
            return list(self._lines)

    def wait_for(self, pattern: str, timeout: float = START) -> re.Match[str]:
        """The first line of stderr that matches, also one that was there before."""
        deadline, seen = time.monotonic() + timeout, 0
        with self._news:
            while True:
                for line in self._lines[seen:]:
                    seen += 1
                    if found := re.search(pattern, line):
                        return found
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "ended" if self._ended else f"did not within {timeout} s"
                    raise AssertionError(f"{self} {why}, waiting for {pattern!r}:\n{self.tail()}")
                self._news.wait(left)

    def wait(self, timeout: float = START) -> int:
        """Its exit code, once it ended by itself and everything it wrote was read."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} still runs after {timeout} s:\n{self.tail()}") from None
        self._reader.join(5)
        return code

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal; one that is gone does not mind."""
        self._popen.send_signal(number)

    def stop(self, timeout: float = 15.0) -> int:
        """End it the polite way, and the other way when that takes too long."""
        self.signal()
        with suppress(AssertionError):
            return self.wait(timeout)
        self._popen.kill()
        return self.wait(timeout)

    def tail(self, lines: int = 30) -> str:
        """The end of what it wrote to stderr."""
        with self._news:
            return "".join(f"  | {line}\n" for line in self._lines[-lines:])

    def _read(self) -> None:
        assert self._popen.stderr is not None
        for raw in self._popen.stderr:
            with self._news:
                self._lines.append(raw.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.command))[:200]} (pid {self.pid})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


# ── The sidecar, and servers behind it ────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Served:
    """Somebody who listens: `url` is where clients come in, `admin` where operators look."""

    process: Process
    url: str
    admin: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def ticket_desk(log: Path, *arguments: str, transport: str = "http") -> Iterator[Served]:
    """The ticket desk over HTTP."""
    with Process(desk(log, "--transport", transport, *arguments)) as process:
        yield Served(process, process.wait_for(LISTENING)[1])


@contextmanager
def http_sidecar(
    upstream: str, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """The sidecar in front of `upstream`, on free ports, once it is ready to decide."""
    where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--upstream", upstream)
    with Process(sidecar("http", *where, *arguments), env=env) as process:
        served = Served(process, process.wait_for(LISTENING)[1], process.wait_for(ADMIN)[1])
        wait_ready(served.admin)
        yield served


@contextmanager
def bridge(
    server: Sequence[str], *arguments: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """The sidecar with the command `server` behind it, over HTTP, once it is ready to decide."""
    where = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    with Process(sidecar("http", *where, *arguments, "--", *server), env=env) as process:
        served = Served(process, process.wait_for(LISTENING)[1], process.wait_for(ADMIN)[1])
        wait_ready(served.admin)
        yield served


def get(url: str, timeout: float = 5.0) -> tuple[int, bytes]:
    """Status and body; no proxy is asked about addresses of this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def wait_ready(admin: str, timeout: float = START) -> None:
    """Until `/readyz` says yes."""

    def ready() -> bool:
        with suppress(OSError):
            return get(f"{admin}/readyz")[0] == 200
        return False

    wait_until(ready, f"{admin}/readyz is 200", timeout)


def executed(log: Path) -> list[dict[str, Any]]:
    """What the ticket desk did, by its own log: `name`, `arguments`, `trace_id` and `pid`."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def done(log: Path) -> list[str]:
    """The names alone."""
    return [record["name"] for record in executed(log)]


# ── Counting ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds on to."""

    files: int
    threads: int
    children: int


def holds_no_more(pid: int, before: Held, slack: int = 5) -> bool:
    """Whether it holds what it held before, but for a few connections that are kept alive."""
    now = held(pid)
    return (
        now.files <= before.files + slack
        and now.threads <= before.threads + slack
        and now.children <= before.children
    )


def held(pid: int) -> Held:
    """What the process `pid` holds now."""
    process = psutil.Process(pid)
    with process.oneshot():
        return Held(process.num_fds(), process.num_threads(), len(process.children()))


def alive(pid: int) -> bool:
    """Whether `pid` is a process that still runs."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they started."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def running(module: str) -> int:
    """The one child of this process that runs `python -m MODULE`."""
    found = [
        child.pid for child in psutil.Process().children() if child.cmdline()[1:3] == ["-m", module]
    ]
    assert len(found) == 1, found
    return int(found[0])
