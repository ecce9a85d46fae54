"""Who writes down what happens: telemetry, the audit, and the feed of the control socket."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.config import Audit, Settings, Telemetry
    from sidecar.conversation import Recorder
    from sidecar.recording import Content
    from sidecar.telemetry import Telemetry as Tracing


def content_of(what: Audit | Telemetry, settings: Settings) -> Content:
    """What is written down of arguments and results, in the audit or on spans."""
    from sidecar.recording import Content

    return Content(what.arguments, what.results, settings.masking)


async def recorders(
    settings: Settings, traces: Tracing, stack: AsyncExitStack
) -> tuple[Recorder, ...]:
    """Those that the settings name; the audit comes first, since it can refuse.

    Raises:
        ConfigError: the audit's file can not be opened, or the control socket not be made.
    """
    found: list[Recorder] = [traces]
    if settings.audit.path is None and settings.control is None:
        return tuple(found)
    content = content_of(settings.audit, settings)
    if settings.control is not None:
        from sidecar.feed import Feed
        from sidecar.transport.control import serving

        feed = Feed(content)
        await stack.enter_async_context(serving(settings.control, feed))
        found.insert(0, feed)
    if settings.audit.path is not None:
        from sidecar.audit import Audit

        stream = 2 if settings.mode == "stdio" else 1
        audit = Audit.open(settings.audit, stream=stream, content=content)
        stack.callback(audit.close)
        traces.observe("authz.audit.failures", lambda: audit.failures)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, audit.reopen)
        found.insert(0, audit)
    return tuple(found)
