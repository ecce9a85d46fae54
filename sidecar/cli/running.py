"""From the command line to a running mode, and to its exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.cli.arguments import CONFIG_FAULT, parse
from sidecar.cli.checking import check
from sidecar.cli.serving import serve_http, serve_stdio
from sidecar.errors import ConfigError, PolicyUnusable

if TYPE_CHECKING:
    from sidecar.config import Mode, Settings

    Command = Callable[[Settings], Coroutine[Any, Any, int]]

POLICY_FAULT = 126

COMMANDS = {
    "pin": ("pinning", "pin"),
    "tail": ("tailing", "tail"),
    "inject": ("injecting", "inject"),
    "uninject": ("injecting", "uninject"),
    "check-inject": ("injecting", "check_inject"),
    "webhook": ("admitting", "webhook"),
    "await": ("awaiting", "await_url"),
    "pause": ("awaiting", "pause"),
    "redirect": ("redirecting", "redirect"),
    "policy": ("building", "policy"),
    "shim": ("shimming", "shim"),
}
"""Commands with options of their own, each in a module that is imported when it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    try:
        command = COMMANDS.get(options.mode)
        if command is not None:
            module, name = command
            done = getattr(import_module(f"sidecar.cli.{module}"), name)(options)
            return run(done) if isinstance(done, Coroutine) else int(done)
        checking = partial(check, online=options.mode == "check" and options.online)
        modes: dict[str, Command] = {"stdio": serve_stdio, "http": serve_http, "check": checking}
        work = modes[options.mode]
        return run(work(_settings(options)))
    except ConfigError as error:
        for problem in (*error.problems, *_policy_problems(options)):
            print(f"mcp-sidecar: {problem}", file=sys.stderr)
        return CONFIG_FAULT
    except PolicyUnusable as error:
        print(f"mcp-sidecar: {error}", file=sys.stderr)
        return POLICY_FAULT


def _policy_problems(options: argparse.Namespace) -> tuple[str, ...]:
    """What `check` has to say of the policy as well, when the configuration can not be used."""
    from sidecar import config

    if options.mode != "check" or options.policy is None:
        return ()
    tools = ("MCP_SIDECAR_OPA_BIN", "MCP_SIDECAR_CACHE")
    others = ("MCP_SIDECAR_", "OTEL_")
    environ = {
        name: value
        for name, value in os.environ.items()
        if name in tools or not name.startswith(others)
    }
    flags = {"policy": options.policy}
    try:
        settings = config.load(mode="check", flags=flags, environ=environ, read=Path.read_text)
        run(check(settings, show=False))
    except (ConfigError, PolicyUnusable) as error:
        return (str(error),)
    return ()


def _settings(options: argparse.Namespace) -> Settings:
    from sidecar import config, logs

    flags = {name: value for name, value in vars(options).items() if name != "mode"}
    mode: Mode = options.mode
    settings = config.load(
        mode=mode, flags=flags, environ=os.environ, read=lambda path: path.read_text("utf-8")
    )
    logs.set_up(settings.log_format, settings.log_level)
    return settings


def run(work: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop, with a garbage collector that leaves what start-up made alone."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_interruptible(work))


async def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Undo a start that a signal ends before `_stopping` takes over: nothing is left behind."""
    task, loop, ended = asyncio.current_task(), asyncio.get_running_loop(), list[int]()

    def end(signum: int) -> None:
        if not ended and task is not None:
            task.cancel()
        ended.append(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end, signum)
    try:
        return await work
    except asyncio.CancelledError:
        if not ended:
            raise
        return 128 + ended[0]
