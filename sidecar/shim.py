"""In the container of a stdio server: a server of its own for each connection to a unix socket.

    python3 -I -S shim.py [--socket PATH] [--peer UID] -- COMMAND [ARG…]

It is the main process of the server's container, in the server's image. A pipe, and no more: bytes
are carried and not looked at, and what is decided is decided by the sidecar, which alone is served:
the kernel says who is on the other end of a connection.

One server waits before anybody comes. If it ends while nobody is there, so does the container, with
its code: a server that can not run is seen where one looks for that. A connection that says nothing
costs no server, so that somebody may see whether we are there.

One file that needs the standard library alone, and little of it: it is put into images that have
no Python (`mcp-sidecar shim --install`).
"""

from __future__ import annotations

import argparse
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from io import FileIO

SOCKET = "/run/mcp-stdio/server.sock"
CHILDREN = 128
"""More than a sidecar asks for (`limits.children`), which says it in a better way."""

CHUNK = 64 * 1024
DRAIN = 10.0
"""Seconds that sessions may go on in, when the container is to end."""

LADDER = (5.0, signal.SIGTERM), (2.0, signal.SIGKILL)
"""How long a server has that was told to end, and what comes then (MCP, stdio shutdown)."""

LAST_WORDS = 1.0
"""Seconds in which what a server has said is carried, once it has ended."""

USAGE, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
"""Exit codes, as those of `env`."""

DESCRIPTORS, OTHERS = 5, 16
"""Of each session, and what else needs some."""

Call = Callable[[int], None]
Environment = Mapping[bytes, bytes]


class Poller:
    """Descriptors, and whom they concern."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Call] = {}

    def watch(self, fd: int, events: int, call: Call) -> None:
        """Have `call` called with the events of a descriptor."""
        if fd in self._calls:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._calls[fd] = call

    def forget(self, fd: int) -> None:
        """Watch it no more. Copies of a descriptor would stay watched when it is closed."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def wait(self, seconds: float) -> None:
        """Let one of them have its turn. One at a time: a number that is closed is used again."""
        for fd, events in self._epoll.poll(seconds if seconds < math.inf else None, 1):
            self._calls[fd](events)


class Pump:
    """Carries bytes from one descriptor to another, a piece at a time, and then closes both."""

    def __init__(self, poller: Poller, source: int, target: int, after: Callable[[], None]) -> None:
        self._poller, self._source, self._target, self._after = poller, source, target, after
        self._piece = b""
        self.over = False
        for each in (source, target):
            os.set_blocking(each, False)
        poller.watch(source, select.EPOLLIN, self._turn)

    def _turn(self, _: int) -> None:
        try:
            self._piece = self._piece or os.read(self._source, CHUNK)
            if not self._piece:
                return self.end()
            self._piece = self._piece[os.write(self._target, self._piece) :]
        except BlockingIOError:
            pass
        except OSError:
            return self.end()
        return self._wait()

    def _wait(self) -> None:
        """For room where a piece is left, else for the next one."""
        if self._piece:
            self._poller.forget(self._source)
            self._poller.watch(self._target, select.EPOLLOUT, self._turn)
        else:
            self._poller.forget(self._target)
            self._poller.watch(self._source, select.EPOLLIN, self._turn)

    def end(self) -> None:
        """Carry no more."""
        if self.over:
            return
        self.over = True
        for each in (self._source, self._target):
            self._poller.forget(each)
            os.close(each)
        self._after()


class Server:
    """A server's process, which leads a group of its own, and its client once there is one."""

    def __init__(self, poller: Poller, command: list[str], environ: Environment) -> None:
        theirs_in, stdin = os.pipe()
        stdout, theirs_out = os.pipe()
        self._poller, self._pipes = poller, [stdin, stdout]
        self._client: socket.socket | None = None
        self._pumps: tuple[Pump, ...] = ()
        self._steps = iter(LADDER)
        self._next: signal.Signals | None = None
        self.code: int | None = None
        self.due = math.inf
        """When something is to be done about it."""
        files = [(os.POSIX_SPAWN_DUP2, theirs_in, 0), (os.POSIX_SPAWN_DUP2, theirs_out, 1)]
        ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python, for itself
        try:
            self.pid = os.posix_spawnp(
                command[0], command, environ, file_actions=files, setpgroup=0, setsigdef=ignored
            )
        except OSError:
            self.close()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)

    def serve(self, client: socket.socket) -> None:
        """Be the server of a connection."""
        self._client, (stdin, stdout) = client, self._pipes
        self._pipes.clear()
        said, heard = client.dup().detach(), client.dup().detach()
        self._pumps = (
            Pump(self._poller, said, stdin, _nothing),
            Pump(self._poller, stdout, heard, self._said_all),
        )
        # A server that does not read keeps what is said to it from coming to its end: this does not
        # wait for that.
        events = select.EPOLLRDHUP | select.EPOLLONESHOT
        self._poller.watch(client.fileno(), events, lambda _: self._climb())

    def _said_all(self) -> None:
        if self._client is not None:
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        """Close its stdin, and see to it that it ends."""
        if self._pumps:
            self._pumps[0].end()
        elif len(self._pipes) == 2:
            os.close(self._pipes.pop(0))
        self._climb()

    def _climb(self) -> None:
        """Begin with the ladder; to be told again hurries nobody."""
        if self.code is None and self.due == math.inf:
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        patience, self._next = next(self._steps, (math.inf, None))
        self.due = time.monotonic() + patience

    def step(self) -> None:
        """Do what is due."""
        if self.code is not None:
            self.close()
        elif self._next is not None:
            self.kill(self._next)
            self._wait_for_next()

    def kill(self, signum: signal.Signals) -> None:
        """Send a signal to all of its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    def ended(self, code: int) -> None:
        """It has ended; what it has said is carried still."""
        self.code, self.due = code, time.monotonic() + LAST_WORDS

    @property
    def over(self) -> bool:
        """Whether it has ended, and all is said."""
        return self.code is not None and all(each.over for each in self._pumps[1:])

    def close(self) -> None:
        """Let go of everything."""
        for pump in self._pumps:
            pump.end()
        while self._pipes:
            os.close(self._pipes.pop())
        if self._client is not None:
            self._poller.forget(self._client.fileno())
            self._client.close()
            self._client = None


class Shim:
    """The socket, who has connected, and the servers: one for each session, and one that waits."""

    def __init__(self, command: list[str], path: str, peer: int, most: int, drain: float) -> None:
        self._command, self._peer, self._drain = command, peer, drain
        self._path, self._beside = path, f"{path}~"
        self._most = max(min(most, (os.sysconf("SC_OPEN_MAX") - OTHERS) // DESCRIPTORS), 1)
        self._environ = _environment()
        self._poller = Poller()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._silent: set[socket.socket] = set()
        self._servers: list[Server] = []
        self._spare: Server | None = None
        self._ending, self._until = False, math.inf
        self._code: int | None = None

    def run(self) -> int:
        """Serve until it is time to end; the exit code."""
        self._hear_signals()
        try:
            self._listen()
            self._spare = self._first()
            if self._code is None:
                os.rename(self._beside, self._path)  # in the place of one of a life before
        except OSError as error:
            _say(f"can not listen on {self._path}: {error.strerror or error}")
            self._code = USAGE
        while self._code is None:
            due = min([self._until, *(each.due for each in self._servers)])
            self._poller.wait(max(due - time.monotonic(), 0))
            self._do_what_is_due()
        self._withdraw()
        return self._code

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._until <= now:
            self._until = math.inf
            for each in self._servers:
                each.hang_up()
        for each in list(self._servers):
            if each.due <= now:
                each.step()
            if each.over:
                self._let_go(each)
        if self._ending and not self._servers:
            self._code = 0

    # ── Servers ───────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> Server:
        server = Server(self._poller, self._command, self._environ)
        self._servers.append(server)
        return server

    def _first(self) -> Server | None:
        try:
            return self._start()
        except OSError as error:
            _say(f"{self._command[0]!r} can not be started: {error.strerror}")
            is_there = not isinstance(error, FileNotFoundError)
            self._code = NOT_EXECUTABLE if is_there else NOT_FOUND
            return None

    def _prepare(self) -> None:
        """Let a server wait for whoever comes next, if there may be one more."""
        if self._spare is None and len(self._servers) <= self._most and not self._ending:
            try:
                self._spare = self._start()
            except OSError as error:
                _say(f"{self._command[0]!r} can not be started once more: {error.strerror}")

    def _let_go(self, server: Server) -> None:
        server.close()
        self._servers.remove(server)
        if server is not self._spare:
            if not self._servers:
                self._prepare()
            return
        self._spare = None
        if not self._ending and not self._servers:
            _say(f"the server has ended with {server.code} before anybody came")
            self._code = server.code
        elif not self._ending:
            # Maybe there can be only one of it at a time: whoever has that one keeps it.
            _say(f"another server has ended with {server.code} before anybody came")

    def _reap(self) -> None:
        """Also orphans: they are those of the first process of a container."""
        with suppress(ChildProcessError):
            what = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while (found := os.waitid(os.P_ALL, 0, what)) is not None:
                mine = (e for e in self._servers if e.pid == found.si_pid and e.code is None)
                server = next(mine, None)
                if server is not None:
                    exited = found.si_code == os.CLD_EXITED
                    # What it has started goes with it. Before it is waited for, since until then
                    # its number is nobody else's.
                    server.kill(signal.SIGKILL)
                    server.ended(found.si_status if exited else 128 + found.si_status)
                os.waitpid(found.si_pid, 0)

    # ── Clients ───────────────────────────────────────────────────────────────────────────────────

    def _listen(self) -> None:
        """Listen beside the path, where nobody looks before there is a server."""
        with suppress(FileNotFoundError):
            os.unlink(self._beside)
        self._listener.bind(self._beside)
        # The sidecar is another user; whoever connects is looked at.
        os.chmod(self._beside, 0o666)  # noqa: S103
        self._listener.listen(self._most)
        self._poller.watch(self._listener.fileno(), select.EPOLLIN, self._accept)

    def _withdraw(self) -> None:
        for each in (self._beside, self._path):
            with suppress(OSError):  # it is not there, or can not be
                os.unlink(each)

    def _accept(self, _: int) -> None:
        try:
            client, _address = self._listener.accept()
        except BlockingIOError:
            return
        sessions = len(self._servers) - (self._spare is not None)
        if (uid := _uid_of(client)) != self._peer:
            _say(f"refused a connection of uid {uid}")
            client.close()
        elif sessions + len(self._silent) >= self._most:
            _say(f"refused a connection: there are {self._most}")
            client.close()
        else:
            self._silent.add(client)
            self._poller.watch(client.fileno(), select.EPOLLIN, partial(self._first_word, client))

    def _first_word(self, client: socket.socket, _: int) -> None:
        """Whoever says something gets a server; who only looked whether we are there, none."""
        self._poller.forget(client.fileno())
        self._silent.remove(client)
        try:
            if not client.recv(1, socket.MSG_PEEK):
                client.close()
                return
            server = self._spare or self._start()
        except OSError as error:
            _say(f"there is no server for a connection: {error.strerror}")
            client.close()
            return
        self._spare = None
        server.serve(client)
        self._prepare()

    # ── Signals ───────────────────────────────────────────────────────────────────────────────────

    def _hear_signals(self) -> None:
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, _nothing)
        self._poller.watch(heard, select.EPOLLIN, lambda _: self._signalled(os.read(heard, CHUNK)))

    def _signalled(self, signals: bytes) -> None:
        if signal.SIGCHLD in signals:
            self._reap()
        if signal.SIGTERM in signals or signal.SIGINT in signals:
            self._end()

    def _end(self) -> None:
        """Take nobody more, and let the sessions end; the second time, end them."""
        self._until = time.monotonic() + (0 if self._ending else self._drain)
        if self._ending:
            return
        self._ending = True
        self._poller.forget(self._listener.fileno())
        self._listener.close()
        self._withdraw()
        for each in self._silent:
            self._poller.forget(each.fileno())
            each.close()
        if self._spare is not None:
            self._spare.hang_up()
            self._spare = None


def _environment() -> Environment:
    """As it was given to us: Python puts a locale into its own (PEP 538)."""
    with FileIO("/proc/self/environ") as file:
        entries = file.readall().split(b"\0")
    pairs = (each.partition(b"=") for each in entries)
    return {name: value for name, is_one, value in pairs if is_one}


def _uid_of(client: socket.socket) -> int:
    said = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", said)[1])


def _say(text: str) -> None:
    """To the log of the container, which is the server's."""
    os.write(2, f"mcp-shim: {text}\n".encode())


def _nothing(*_: object) -> None:
    """Nothing more is to be done."""


# ── Commands ──────────────────────────────────────────────────────────────────────────────────────


def add_options(parser: argparse.ArgumentParser) -> None:
    """What can be said before `--`."""
    parser.add_argument(
        "--socket", metavar="PATH", default=SOCKET, help="where to listen (default: %(default)s)"
    )
    parser.add_argument(
        "--peer", metavar="UID", type=int, help="who is served, and nobody else (default: we)"
    )
    parser.add_argument(
        "--children",
        metavar="N",
        type=int,
        default=CHILDREN,
        help="sessions (default: %(default)s)",
    )
    parser.add_argument(
        "--drain", metavar="SECONDS", type=float, default=DRAIN,
        help="that sessions may go on in after SIGTERM (default: %(default)s)",
    )  # fmt: skip


def serve(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Serve `command` until it is time to end; the exit code."""
    peer = os.getuid() if options.peer is None else options.peer
    return Shim(list(command), options.socket, peer, options.children, options.drain).run()


def words(folder: str) -> list[str]:
    """How what `--install` has put into `folder` is started: options, `--` and a command follow.

    Nothing of the image takes part: neither its loader and libraries nor a Python of its own.
    """
    loader = [f"{folder}/ld.so", "--library-path", f"{folder}/lib", f"{folder}/bin/python3"]
    return [*loader, "-I", "-S", "-X", "utf8", f"{folder}/shim.py"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, and our exit code."""
        _say(message)
        sys.exit(USAGE)


def main(arguments: Sequence[str]) -> int:
    """The command line of this file alone; the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    shape = partial(argparse.HelpFormatter, width=100)  # to look it up takes another module
    usage = "shim.py [OPTIONS] -- COMMAND [ARG...]"
    parser = _Parser(prog="shim.py", usage=usage, formatter_class=shape)
    add_options(parser)
    options, command = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    if not command:
        parser.error(f"there is no COMMAND; usage: {usage}")
    return serve(options, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
