"""What can be said on the command line."""

from __future__ import annotations

import argparse
import re
import sys
from difflib import get_close_matches
from ipaddress import ip_address
from typing import NoReturn

from sidecar import __version__, shim

CONFIG_FAULT = 125

LATER = ("audit",)
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
  mcp-sidecar tail --control /run/mcp-sidecar/control.sock --decision deny
  mcp-sidecar inject -f deployment.yaml | kubectl apply -f -
  mcp-sidecar shim --socket /run/mcp-stdio/server.sock --peer 20001 -- python server.py

exit codes: 125 configuration or usage, 126 OPA or its policy unusable, else the wrapped command's
"""
OPTIONS_EPILOG = """\
Every option may also be set in the file (--config) or as MCP_SIDECAR_<OPTION>; flags win over the
environment, which wins over the file. OTEL_* variables configure the exporter as usual.
"""
TAIL_DESCRIPTION = """\
Show what a running sidecar decides, an action a line: when, the decision, who (and for whom), what,
on which resource, what came of it, why, the rule and the policy's revision, and how long it took.
A denial is shown at once, an allowed action when it has ended.

The sidecar has to be started with --control PATH (or MCP_SIDECAR_CONTROL, which both understand).
Only the user that runs it, and root, can watch. Names that callers choose are shown harmlessly.
"""
TAIL_EPILOG = """\
examples:
  mcp-sidecar tail --decision deny                    who is refused what, and why
  mcp-sidecar tail --actor agent                      what agents do; also agent:support-*, or a key
  mcp-sidecar tail --tool 'delete_*' -n 200           what was deleted lately, and goes on to be
  mcp-sidecar tail --json | jq 'select(.type == "decision")'

The records of --json are those of the audit file. Two belong to an action, by their decision_id.
A line "… 12 records not shown" means that they came faster than they were read.

exit codes: 130 interrupted, 1 the sidecar has ended, 125 there is none, or it can not be watched
"""
INJECT_EPILOG = """\
examples:
  mcp-sidecar inject -f deployment.yaml | kubectl apply -f -
  kubectl get deployment tickets -o yaml | mcp-sidecar inject -f - --image registry/sidecar@sha256:…

What is not injected stays as it is, byte for byte. When one pod is refused, nothing is written.
"""
SHIM_DESCRIPTION = """\
Stand in the container of a stdio server, for the sidecar in another one
(`http --upstream unix-stdio:///PATH`): each connection to the socket gets a process of COMMAND of
its own, whose stdin and stdout it is. Bytes are carried and not looked at. Linux only.

One process waits for the first connection; when it ends before that, so does the shim, with its
code.
"""
SHIM_EPILOG = """\
`--install` is for an init container: what it writes runs in any image for the same kind of machine,
also in one that has neither a Python nor a libc:

  FOLDER/ld.so --library-path FOLDER/lib FOLDER/bin/python3 -I -S -X utf8 FOLDER/shim.py \\
      [OPTIONS] -- COMMAND [ARG...]

exit codes: 0 ended by SIGTERM, 125 usage, 126 or 127 COMMAND can not be executed or found, else
COMMAND's own
"""
BUILD_EPILOG = """\
examples:
  mcp-sidecar policy build ./policy -o configmap.yaml --namespace support
  mcp-sidecar policy build ./policy -o bundle.tar.gz --signing-key key.pem --signing-alg ES256

Tests (*_test.rego) stay behind. Data outside of `mcp` is refused: revocations are a bundle of their
own (`mcp_revoked`).
"""
REVOKE_EPILOG = """\
example of a FILE:
  principals: ["https://idp.example.com|u-1042", "static|bot"]   # ISSUER|ID
  tokens: [f81d4fae]                                             # their ids (jti)

  mcp-sidecar policy revoke revoked.yaml -o revoked.tar.gz --signing-key key.pem --scope revoked
"""
SIGNING = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
LEGACY = "a path that ends in /sse means legacy HTTP+SSE"
SHIMMED = "unix-stdio:///PATH the socket of `mcp-sidecar shim`"


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
    _add_tail(modes)
    _add_policy(modes)
    _add_injector(modes)
    _add_shim(modes)
    _refuse_unknown_command(arguments, parser, tuple(modes.choices))
    options = parser.parse_args(arguments)
    options.command = command
    if options.mode == "shim" and bool(command) is bool(options.install):
        modes.choices["shim"].error("shim needs -- COMMAND, or --install FOLDER")
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
        "--upstream",
        metavar="URL",
        help=f"an HTTP server's, in place of a COMMAND; {LEGACY}, {SHIMMED}",
    )
    _add_common(parser)


def _add_http(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "http",
        help="HTTP in front of an HTTP server, or of a stdio server",
        usage="mcp-sidecar http [OPTIONS] --listen HOST:PORT "
        "(--upstream [NAME=]URL | -- COMMAND [ARG...])",
        description="Listen for MCP clients and stand between them and the server at URL, or a "
        "server that COMMAND starts, anew for each session, and that is served at /mcp. So is one "
        "that a shim starts behind a unix socket (unix-stdio:///PATH).",
        epilog=OPTIONS_EPILOG,
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="where clients come in; several addresses: [A,B]:PORT"
    )
    parser.add_argument(
        "--upstream", metavar="[NAME=]URL", action="append",
        help=f"the server's endpoint, whose path is served; of several, each below /NAME; {LEGACY},"
        f" {SHIMMED}",
    )  # fmt: skip
    _add_common(parser)


def _add_check(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "check",
        help="check configuration, policy and OPA before anything is deployed",
        description="Read the configuration, compile the policy, ask OPA one question, and print "
        "the settings that would be in force. Every problem is shown at once.",
        epilog=OPTIONS_EPILOG,
    )
    parser.add_argument(
        "--online", action="store_true", help="fetch the keys of every issuer too, over the network"
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
    parser.add_argument("--upstream", metavar="URL", help=f"an HTTP server's; {LEGACY}, {SHIMMED}")
    parser.add_argument(
        "--check", metavar="FILE", help="say what is not as in this file of pins, and write none"
    )
    parser.add_argument("--token-file", metavar="FILE", help="a bearer token for the server at URL")


def _add_tail(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "tail",
        help="watch a running sidecar decide",
        usage="mcp-sidecar tail [OPTIONS]",
        description=TAIL_DESCRIPTION,
        epilog=TAIL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--control", metavar="PATH", help="the sidecar's socket (default: $MCP_SIDECAR_CONTROL)"
    )
    parser.add_argument(
        "--actor", metavar="GLOB", default="", help="type, TYPE:ID, id or key of who acts, or id "
        "or key of the one it acts for",
    )  # fmt: skip
    parser.add_argument(
        "--tool", metavar="GLOB", default="", help="name of the tool or other target"
    )
    parser.add_argument("--decision", choices=("allow", "deny", "error"), default="")
    parser.add_argument(
        "-n", metavar="LAST", dest="last", type=_last, default=10,
        help="begin with the last so many actions of the 200 that are kept (default: 10)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the records as they are, a line each")
    parser.add_argument("--no-color", action="store_true", help="as $NO_COLOR does")


def _add_policy(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser("policy", help="make a policy ready for the OPA of a pod")
    works = parser.add_subparsers(dest="work", required=True, metavar="WORK", parser_class=Parser)
    build = works.add_parser("build", help="a bundle or a ConfigMap, checked and stamped",
        description="Put the library and DIR together, check them as `check` does, stamp them with "
        "a revision, and write a bundle or a ConfigMap with the root `mcp`.",
        epilog=BUILD_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    build.add_argument("folder", metavar="DIR", help="the policy")
    build.add_argument("-o", metavar="FILE", dest="output", required=True,
        help="bundle.tar.gz, or configmap.yaml")  # fmt: skip
    build.add_argument(
        "--name", default="mcp-policy", help="the ConfigMap's (default: %(default)s)"
    )
    build.add_argument("--namespace", help="the ConfigMap's (default: whoever applies it)")
    revoke = works.add_parser("revoke", help="a bundle of what is revoked",
        description="Write a bundle with the root `mcp_revoked`, which OPA fetches more often than "
        "the policy. FILE is all that is revoked, not what is new.",
        epilog=REVOKE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    revoke.add_argument("file", metavar="FILE", help="YAML: principals and tokens")
    revoke.add_argument("-o", metavar="FILE", dest="output", required=True, help="revoked.tar.gz")
    for each in (build, revoke):
        _add_signing(each)


def _add_signing(build: Parser) -> None:
    build.add_argument("--signing-key", metavar="FILE", help="PEM of the key that signs the bundle")
    build.add_argument("--signing-alg", default="RS256", choices=SIGNING, help="RS256 unless set")
    build.add_argument("--scope", help="the scope that OPA demands of the signature")


def _add_injector(modes: argparse._SubParsersAction[Parser]) -> None:
    inject = modes.add_parser("inject", help="put the sidecar into the pods of manifests",
        description="Write the manifests with sidecar and OPA in every pod that does not say no.",
        epilog=INJECT_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    uninject = modes.add_parser("uninject", help="take it out again",
        description="Write the manifests as they were before `inject`, or before the webhook.",
    )  # fmt: skip
    why = modes.add_parser("check-inject", help="say why a pod is injected, or is not",
        description="Say of every pod of the manifests whether the webhook injects it, and why.",
        epilog="exit codes: 0 none is refused, 1 some are",
    )  # fmt: skip
    why.add_argument("--enabled", action="store_true",
        help="as in a namespace with the label mcp-opa-sidecar.io/injection=enabled")  # fmt: skip
    gate = modes.add_parser("await", help="wait until a URL of this pod answers with 200",
        description="For the postStart hook of a container that others have to wait for.",
        epilog="exit codes: 0 it does; 1 not in time")  # fmt: skip
    gate.add_argument("url", metavar="URL", help="http://127.0.0.1:PORT/PATH")
    gate.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    pause = modes.add_parser("pause", help="return after so many seconds",
        description="For the preStop hook of a container that goes on until Services let go of its "
        "pod.")  # fmt: skip
    pause.add_argument("seconds", metavar="SECONDS", type=float)
    rules = modes.add_parser("redirect", help="bring what dials a port of this pod to another",
        description="The first container of a pod in mode redirect, with NET_ADMIN and nft: make "
        "the rules, and prove them by dialling.",
        epilog="exit codes: 0 proved; 125 there are no rules; 126 they do not hold")  # fmt: skip
    rules.add_argument("--port", metavar="PORT", type=_port, required=True, help="the server's")
    rules.add_argument("--to", metavar="PORT", type=_port, required=True, help="the sidecar's")
    rules.add_argument("--except-uid", metavar="UID", type=_uid, required=True,
        help="the user who reaches the server: the sidecar's")  # fmt: skip
    rules.add_argument("--address", metavar="IP", type=_addresses, default=(),
        help="the pod's own, with commas between them")  # fmt: skip
    _add_webhook(modes)
    for each in (inject, uninject, why):
        each.add_argument("-f", metavar="FILE", dest="file", required=True, help="- is stdin")
    for each in (inject, why):
        _add_injected(each)


def _add_injected(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML: what is injected")
    parser.add_argument("--image", metavar="IMAGE", help="of sidecar and OPA")


def _add_webhook(modes: argparse._SubParsersAction[Parser]) -> None:
    served = modes.add_parser("webhook", help="serve the injector to the API server",
        description="Serve the mutating and the validating admission controller over TLS, with a "
        "certificate from files, which are read again when they change, or with one that the "
        "injector makes and renews itself.",
    )  # fmt: skip
    _add_injected(served)
    served.add_argument("--listen", metavar="HOST:PORT", default="0.0.0.0:8443")
    served.add_argument("--health", metavar="HOST:PORT", default="127.0.0.1:8081",
        help="plain /healthz, /readyz and /metrics (default: %(default)s)")  # fmt: skip
    files = served.add_argument_group("a certificate from files")
    files.add_argument("--cert", metavar="FILE", help="PEM, with the chain")
    files.add_argument("--key", metavar="FILE", help="PEM, without a password")
    own = served.add_argument_group("a certificate of its own")
    own.add_argument("--self-signed", action="store_true",
        help="make authority and certificate, keep them in a Secret of the injector's namespace, "
        "and have both webhook configurations believe them, and nobody else")  # fmt: skip
    own.add_argument("--secret", metavar="NAME", default="mcp-opa-sidecar-injector-tls",
        help="default: %(default)s")  # fmt: skip
    own.add_argument("--service", metavar="NAME", default="mcp-opa-sidecar-injector",
        help="whose certificate it is (default: %(default)s)")  # fmt: skip
    own.add_argument("--host", metavar="NAME", action="append", default=[], dest="hosts",
        help="one more name or address of it; may be repeated")  # fmt: skip
    own.add_argument("--registration", metavar="NAME", default="mcp-opa-sidecar",
        help="of both webhook configurations (default: %(default)s)")  # fmt: skip
    cluster = served.add_argument_group("the API server, for own certificates and for Events")
    cluster.add_argument("--api-server", metavar="URL", help="default: that of the own cluster")
    cluster.add_argument("--account", metavar="DIR",
        default="/var/run/secrets/kubernetes.io/serviceaccount",
        help="token, ca.crt and namespace of a service account (default: %(default)s)")  # fmt: skip


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError("1 to 65535")
    return int(text)


def _uid(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise argparse.ArgumentTypeError("a number")
    return int(text)


def _addresses(text: str) -> tuple[str, ...]:
    try:
        return tuple(str(ip_address(each)) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("IP addresses, with commas between them") from None


def _add_shim(modes: argparse._SubParsersAction[Parser]) -> None:
    parser = modes.add_parser(
        "shim",
        help="in the container of a stdio server: serve it to the sidecar on a unix socket",
        usage="mcp-sidecar shim ([OPTIONS] -- COMMAND [ARG...] | --install FOLDER)",
        description=SHIM_DESCRIPTION,
        epilog=SHIM_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shim.add_options(parser)
    parser.add_argument(
        "--install", metavar="FOLDER", help="write the shim, and all that it needs, into a folder"
    )


def _last(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text):
        raise argparse.ArgumentTypeError("0 to 999")
    return int(text)


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
    parser.add_argument(
        "--control", metavar="PATH", help="unix socket for `mcp-sidecar tail`, for this user alone"
    )
    parser.add_argument("--otlp", metavar="URL", help="send spans to this OTLP collector")
    parser.add_argument(
        "--shadow",
        action="store_true",
        default=None,
        help="record denials and enforce none but revocations",
    )
