"""What can be said on the command line."""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from typing import NoReturn

from sidecar import __version__

CONFIG_FAULT = 125

LATER = ("shim", "inject", "uninject", "check-inject", "webhook", "policy", "audit", "tail")
"""Commands that have a name and a place, and are not there yet."""

DESCRIPTION = """\
Decides, per request, what an MCP client may do: every action is put to Open Policy Agent before the
server sees it, and leaves a span and an audit record.
"""
EPILOG = """\
examples:
  mcp-sidecar stdio --policy ./policy --actor agent:support-bot -- python server.py
  mcp-sidecar http --policy ./policy --listen 127.0.0.1:15801 --upstream http://127.0.0.1:8080/mcp
  mcp-sidecar http --policy ./policy --listen 127.0.0.1:15801 -- python server.py
  mcp-sidecar check --policy ./policy
  mcp-sidecar pin --upstream http://127.0.0.1:8080/mcp > pins.json

exit codes: 125 configuration or usage, 126 OPA or its policy unusable, else the wrapped command's
"""
OPTIONS_EPILOG = """\
Every option may also be set in the file (--config) or as MCP_SIDECAR_<OPTION>; flags win over the
environment, which wins over the file. OTEL_* variables configure the exporter as usual.
"""
LEGACY = "a path that ends in /sse means legacy HTTP+SSE"


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong usage."""

    def error(self, message: str) -> NoReturn:
        """One screen: what is wrong, and where help is."""
        print(f"mcp-sidecar: {message}\ntry: {self.prog} --help", file=sys.stderr)
        sys.exit(CONFIG_FAULT)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with `command` as what stands behind `--`; wrong usage ends the process."""
    arguments, command = _split_command(arguments)
    if arguments and arguments[0] in LATER:
        print(f"mcp-sidecar: {arguments[0]!r} is not there yet", file=sys.stderr)
        sys.exit(CONFIG_FAULT)
    parser = Parser(
        prog="mcp-sidecar",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mcp-opa-sidecar {__version__}")
    modes = parser.add_subparsers(
        dest="mode", required=True, metavar="COMMAND", parser_class=Parser
    )
    _add_stdio(modes)
    _add_http(modes)
    _add_check(modes)
    _add_pin(modes)
    _refuse_unknown_command(arguments, parser, tuple(modes.choices))
    options = parser.parse_args(arguments)
    options.command = command
    if options.mode == "pin" and bool(command) is bool(options.upstream):
        modes.choices["pin"].error("pin needs one server: --upstream URL, or -- COMMAND")
    return options


def _split_command(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before `--`, and the wrapped command behind it."""
    if "--" not in arguments:
        return arguments, ()
    cut = arguments.index("--")
    return arguments[:cut], tuple(arguments[cut + 1 :])


def _refuse_unknown_command(
    arguments: list[str], parser: argparse.ArgumentParser, known: tuple[str, ...]
) -> None:
    if not arguments or arguments[0].startswith("-") or arguments[0] in known:
        return
    near = get_close_matches(arguments[0], known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
    parser.error(f"there is no command {arguments[0]!r}{hint}")


def _add_stdio(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "stdio",
        help="stdin and stdout in front of a stdio server, or of an HTTP server",
        usage="mcp-sidecar stdio [OPTIONS] (-- COMMAND [ARG...] | --upstream URL)",
        description="Stand between the client on stdin and stdout and a server: COMMAND, which is "
        "started, or the one behind HTTP at URL.",
        epilog=OPTIONS_EPILOG,
    )
    parser.add_argument(
        "--upstream", metavar="URL", help=f"an HTTP server's, in place of a COMMAND; {LEGACY}"
    )
    _add_common(parser)


def _add_http(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "http",
        help="HTTP in front of an HTTP server, or of a stdio server",
        usage="mcp-sidecar http [OPTIONS] --listen HOST:PORT "
        "(--upstream URL | -- COMMAND [ARG...])",
        description="Listen for MCP clients and stand between them and the server at URL, or a "
        "server that COMMAND starts, anew for each session, and that is served at /mcp.",
        epilog=OPTIONS_EPILOG,
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="where clients come in")
    parser.add_argument(
        "--upstream", metavar="URL", help=f"the server's endpoint, whose path is served; {LEGACY}"
    )
    _add_common(parser)


def _add_check(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "check",
        help="check configuration, policy and OPA before anything is deployed",
        description="Read the configuration, compile the policy, ask OPA one question, and print "
        "the settings that would be in force. Every problem is shown at once.",
        epilog=OPTIONS_EPILOG,
    )
    _add_common(parser)


def _add_pin(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "pin",
        help="write down a server's tools as they are, or compare them with that",
        usage="mcp-sidecar pin [OPTIONS] (-- COMMAND [ARG...] | --upstream URL)",
        description="List the tools of a server and write pins to stdout, for `catalog.pins`: a "
        "tool that changes later, or is new, is not `pinned`. Nothing is called, no policy asked.",
        epilog="exit codes: 0 written, or as pinned; 1 not as pinned; 125 could not be listed",
    )
    parser.add_argument("--upstream", metavar="URL", help=f"an HTTP server's; {LEGACY}")
    parser.add_argument(
        "--check", metavar="FILE", help="say what is not as in this file of pins, and write none"
    )
    parser.add_argument("--token-file", metavar="FILE", help="a bearer token for the server at URL")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these and more")
    parser.add_argument(
        "--policy", metavar="DIR", help="run an own OPA with the library and this folder"
    )
    parser.add_argument(
        "--opa", metavar="URL", help="ask a co-located OPA: http://HOST:PORT or unix:///PATH"
    )
    parser.add_argument(
        "--actor",
        metavar="TYPE:ID",
        help="who is on the other end: human, service or agent, and a name (default: unknown)",
    )
    parser.add_argument(
        "--admin", metavar="HOST:PORT", help="serve /livez, /readyz and /metrics; `off` for none"
    )
    parser.add_argument(
        "--audit",
        metavar="FILE",
        help="append decision and outcome records; `-` is stdout of http, stderr of stdio",
    )
    parser.add_argument("--otlp", metavar="URL", help="send spans to this OTLP collector")
    parser.add_argument(
        "--shadow",
        action="store_true",
        default=None,
        help="record denials and enforce none but revocations",
    )
