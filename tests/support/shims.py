"""A shim as a process of the test, and connections to it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.processes import ROOT, Process, wait_until

ALONE = [sys.executable, "-I", "-S", str(ROOT / "sidecar" / "shim.py")]
"""As in a server's container, but for the interpreter."""


@dataclass(frozen=True, slots=True)
class Shim:
    """One that listens."""

    process: Process
    path: Path

    @property
    def url(self) -> str:
        return f"unix-stdio://{self.path}"

    def connect(self, timeout: float = 20.0) -> socket.socket:
        """A connection, of which nothing is known yet."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(timeout)
        try:
            client.connect(str(self.path))
        except OSError:
            client.close()
            raise
        return client

    def servers(self) -> list[int]:
        """The processes that it has started and that run, those that wait among them."""
        children = psutil.Process(self.process.pid).children()
        return [each.pid for each in children if each.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def shim(
    command: Sequence[str],
    folder: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = ALONE,
) -> Iterator[Shim]:
    """A shim that serves `command` at a socket in `folder`."""
    path = folder / "desk.sock"
    words = [*program, "--socket", str(path), *options, "--", *command]
    with Process(words, env=env) as process:
        wait_until(lambda: path.is_socket() or process.ended, "the shim listens")
        yield Shim(process, path)


def line(client: socket.socket) -> str:
    """The next line, or what there is before the end."""
    found = bytearray()
    while not found.endswith(b"\n") and (byte := client.recv(1)):
        found += byte
    return found.decode().rstrip("\n")


def rest(client: socket.socket) -> bytes:
    """Everything until the end."""
    found = bytearray()
    while data := client.recv(65536):
        found += data
    return bytes(found)


def ask(client: socket.socket, text: str) -> str:
    """Say a line, and hear one."""
    client.sendall(f"{text}\n".encode())
    return line(client)
