"""`redirect`: the first container of a pod in mode `redirect`. It makes the rules and proves them.

Exit code 0 means that whatever dials the server's port from within the pod was seen to arrive at
the sidecar's. Anything else keeps the pod from starting.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from sidecar.errors import ConfigError
from sidecar.injector.firewall import ruleset

UNPROVED = 126
SECONDS = 5.0
LOOPBACK = "127.0.0.1", "::1"

Family = socket.AddressFamily


def redirect(options: argparse.Namespace) -> int:
    """Make the rules and prove them; the exit code.

    Raises:
        ConfigError: there is no `nft`, or the kernel does not take the rules.
    """
    _apply(ruleset(options.port, options.to, options.except_uid))
    wrong = list(_disproved(options.port, options.to, (*LOOPBACK, *options.address)))
    for each in wrong:
        print(f"mcp-sidecar: {each}", file=sys.stderr)
    if wrong:
        return UNPROVED
    print(f"port {options.port} is redirected to {options.to}, but for user {options.except_uid}")
    return 0


def _apply(rules: str) -> None:
    try:
        done = subprocess.run(
            ["nft", "-f", "-"],  # noqa: S607 (of the image, whose PATH is ours)
            input=rules,
            capture_output=True,
            text=True,
            timeout=SECONDS * 2,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"nft can not be run: {error}") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise ConfigError(f"nft refuses the rules (CAP_NET_ADMIN is needed): {said}")


def _disproved(port: int, to: int, addresses: tuple[str, ...]) -> Iterator[str]:
    """What does not arrive at `to`, where nobody listens yet but us, when it dials `port`."""
    with ExitStack() as stack:
        listeners: dict[Family, socket.socket] = {}
        for host in addresses:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            if not _is_ours(host, family):
                if host in LOOPBACK[1:]:
                    continue  # a pod without IPv6
                yield f"{host} is no address of this pod"
                continue
            if family not in listeners:
                listeners[family] = stack.enter_context(_listener(to, family))
            if not _arrives(listeners[family], host, port, family):
                yield f"what dials {host}:{port} does not arrive at port {to}"


def _listener(port: int, family: Family) -> socket.socket:
    host = "::" if family == socket.AF_INET6 else ""
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"port {port} can not be had: {error}") from error


def _is_ours(host: str, family: Family) -> bool:
    with suppress(OSError), socket.socket(family) as any_port:
        any_port.bind((host, 0))
        return True
    return False


def _arrives(listener: socket.socket, host: str, port: int, family: Family) -> bool:
    listener.settimeout(SECONDS)
    with suppress(OSError), socket.socket(family) as dialling:
        dialling.settimeout(SECONDS)
        dialling.connect((host, port))
        accepted, peer = listener.accept()
        accepted.close()
        return bool(peer[:2] == dialling.getsockname()[:2])
    return False
