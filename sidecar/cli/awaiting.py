"""`await` and `pause`: the hooks of ordered pods, before the next container and before the end."""

from __future__ import annotations

import argparse
import time
import urllib.request
from contextlib import suppress

from sidecar.errors import ConfigError

AGAIN = 0.1
LATE = 1
MAX_SECONDS = 3600.0


def await_url(options: argparse.Namespace) -> int:
    """Ask until the answer is 200; the exit code, 1 when it was not in time.

    Raises:
        ConfigError: it is no URL that can be asked.
    """
    if not options.url.startswith(("http://127.0.0.1:", "http://[::1]:", "http://localhost:")):
        raise ConfigError(f"{options.url!r} is not http://127.0.0.1:PORT/PATH")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + min(options.seconds, MAX_SECONDS)
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError), direct.open(options.url, timeout=1) as answer:
            if answer.status == 200:
                return 0
        time.sleep(AGAIN)
    print(f"mcp-sidecar: {options.url} was not there within {options.seconds:g} s")
    return LATE


def pause(options: argparse.Namespace) -> int:
    """Let some time pass."""
    time.sleep(min(max(options.seconds, 0.0), MAX_SECONDS))
    return 0
