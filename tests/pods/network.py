"""A pod's network: one namespace for it and one for everybody else, with a cable between them.

No route leads out of either. Addresses are those that are set aside for documentation.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

NAMESPACES = Path("/run/netns")
POD_IP, POD_IP6 = "192.0.2.2", "2001:db8::2"
OUTSIDE_IP, OUTSIDE_IP6 = "192.0.2.1", "2001:db8::1"
PEERS = {POD_IP: (OUTSIDE_IP, 24), POD_IP6: (OUTSIDE_IP6, 64)}
"""Who is at the other end of the cable, and how long the prefix is that both have."""

Value = TypeVar("Value")

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(RuntimeError):
    """Namespaces can not be had here."""


class Network:
    """Two namespaces, for as long as the block lasts; the pod's has these addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses or (POD_IP,)
        self._name = f"mcp-pod-{secrets.token_hex(4)}"
        self.pod = NAMESPACES / f"{self._name}-in"
        self.outside = NAMESPACES / f"{self._name}-out"

    def __enter__(self) -> Self:
        cable = f"m{self._name[-8:]}"
        try:
            for each in (self.pod, self.outside):
                _ip("netns", "add", each.name)
            _ip(
                "link", "add", f"{cable}p", "netns", self.pod.name, "type", "veth",
                "peer", "name", f"{cable}o", "netns", self.outside.name,
            )  # fmt: skip
            ends = ((self.pod, f"{cable}p"), (self.outside, f"{cable}o"))
            for end, name in ends:
                _ip("-n", end.name, "link", "set", name, "up")
                _ip("-n", end.name, "link", "set", "lo", "up")
            for address in self.addresses:
                outside, prefix = PEERS[address]
                for (end, name), own in zip(ends, (address, outside), strict=True):
                    add = ("address", "add", f"{own}/{prefix}", "dev", name)
                    _ip("-n", end.name, *add, *(["nodad"] if ":" in own else []))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self.pod, self.outside):
            if each.exists():
                _ip("netns", "delete", each.name)

    def from_outside(self, work: Callable[[], Value]) -> Value:
        """What `work` gives, done where other pods and the node are."""
        return within(self.outside, work)


def within(namespace: Path, work: Callable[[], Value]) -> Value:
    """What `work` gives in a network namespace: in a thread that has entered it."""
    found: list[Value] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            enter(namespace)
            found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def enter(namespace: Path) -> None:
    """Let this thread, and those that it starts, be in a network namespace from now on."""
    file = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(file, 0x40000000) != 0:  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"can not enter {namespace}")
    finally:
        os.close(file)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise Unavailable(f"ip {' '.join(words)}: {done.stderr.strip()}")
