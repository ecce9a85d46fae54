"""Settings: read once, into frozen values.

Four sources, of which a later one wins: the standard variables `OTEL_*` and `POD_*`, one YAML file
(`--config`), the variables `MCP_SIDECAR_*`, and flags. A flag such as `--audit` has the variable
`MCP_SIDECAR_AUDIT`, every scalar of the file has `MCP_SIDECAR_<GROUP>__<KEY>`, as in
`MCP_SIDECAR_LIMITS__NESTING`; an empty variable counts as not set.

`KEYS` is the table of all that the file can say, and its readers are all that looks at a value.
`config.schema.json` says the same to editors; a unit test holds the two together, since importing
`jsonschema` takes too long for a wrapper that is started anew for every client. Nothing here opens
a file or reads the environment: both are arguments.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from sidecar.errors import ConfigError, NotSupported
from sidecar.policy.identity import STATIC_ISSUER, UNKNOWN, Actor, Principal, static

Mode = Literal["stdio", "http", "check"]


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on."""

    host: str  # a name, or an IP address without brackets
    port: int  # 0: any free port; the log line `listening` says which

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach it; of names, only `localhost` is believed."""
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host.lower() == "localhost"


@dataclass(frozen=True, slots=True)
class Upstream:
    """One MCP server behind HTTP."""

    name: str  # `server.name` of the input document; never what the server says of itself
    path: str  # where the sidecar serves it; default: the path of `url`
    url: str  # http(s)://HOST[:PORT]/PATH of the server's endpoint


@dataclass(frozen=True, slots=True)
class Opa:
    """Who decides, and how long an answer may take. One of `policy` and `url` is set."""

    policy: Path | None = None  # folder of the own OPA's policy, laid over the library
    url: str | None = None  # co-located OPA: http(s)://… or unix:///PATH
    deadline: float = 0.5  # seconds for a decision; late is a deny, so a call never hangs on it
    listing_deadline: float = 2.0  # seconds for a listing, which asks about many items at once
    binary: str | None = None  # the `opa` to run; None: PATH, then `tools`
    tools: Path = Path("/nonexistent")  # folder that `make` fills with tools: CACHE/bin
    poll: float = 0.5  # seconds between looks at the policy folder; an edit is in force within 2 s
    canary: float = 2.0  # seconds between readiness questions


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is on the other end."""

    actor: Actor = UNKNOWN  # the static actor; unknown, so that policy says no, unless configured
    static_for_all: bool = False  # accept the static actor on an address that others can reach


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What a denial does, and what the caller learns."""

    shadow: Literal["off", "allowed", "all"] = "off"  # which denials are recorded, not enforced
    disclose: Literal["full", "codes"] = "full"  # `codes` keeps the reasons' messages back
    denial: Literal["error", "result"] = "error"  # `result`: `isError`, for models that recover


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one peer can make the sidecar hold, or wait for."""

    client_message: int = 4 * 1024 * 1024  # bytes; what is judged is small
    server_message: int = 64 * 1024 * 1024  # bytes; results carry images and files
    nesting: int = 64  # levels of JSON; far below where a recursive parser breaks
    calls_in_flight: int = 1000  # beyond it a call is answered -31429, retryable
    sessions: int = 10_000  # HTTP sessions that are remembered
    children: int = 100  # servers that `http -- COMMAND` runs at once: one for each session
    connect: float = 5.0  # seconds to reach the upstream
    response: float | None = None  # seconds until its answer begins; None: tools may take hours
    drain: float = 10.0  # seconds that a shutdown waits for what is in flight
    catalog: float = 2.0  # seconds that a first call waits for the list of tools


@dataclass(frozen=True, slots=True)
class Protocol:
    """Where MCP leaves room."""

    big_integers: Literal["refuse", "pass"] = "refuse"  # beyond ±(2^53-1) servers read differently
    methods: tuple[str, ...] = ()  # vendor methods, asked as target type `method`; others: denied


@dataclass(frozen=True, slots=True)
class Http:
    """Who may call over HTTP, and what goes on."""

    hosts: tuple[str, ...] = ()  # Host names, lower case; (): loopback's on loopback, else any
    origins: tuple[str, ...] = ()  # Origins, lower case, besides loopback's on a loopback listen
    forward_authorization: bool = True  # to the upstream; right while the sidecar verifies no token


@dataclass(frozen=True, slots=True)
class Bridge:
    """A stdio server behind HTTP (`http -- COMMAND`)."""

    path: str = "/mcp"  # where it is served
    shared: bool = False  # one more server, shared by all clients of the stateless revision


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where spans go."""

    otlp: str | None = None  # base URL of the collector; None: `OTEL_EXPORTER_OTLP_*` name it
    protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"  # gRPC is slow to import
    exporter: Literal["otlp", "console", "none"] = "none"  # `otlp` as soon as a collector is named
    ratio: float = 1.0  # share of allowed calls that is exported; denials and errors always are
    service_name: str = "mcp-opa-sidecar"  # the resource's `service.name`


@dataclass(frozen=True, slots=True)
class Audit:
    """Where the record goes."""

    path: str | None = None  # file; "-": stdout of `http`, stderr of `stdio` (stdout carries MCP)
    sync: bool = False  # fsync each record: safe against a crash of the machine, costs a disk write


@dataclass(frozen=True, slots=True)
class Pod:
    """`context.pod` of the input document; None: not in a pod, the key is absent."""

    name: str | None = None
    namespace: str | None = None
    service_account: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything, for one run."""

    mode: Mode  # `check` is for `mcp-sidecar check`: as `http`, but nothing to serve is needed
    opa: Opa
    command: tuple[str, ...] = ()  # the wrapped server
    listen: Listen | None = None  # http: where clients come in
    upstreams: tuple[Upstream, ...] = ()  # http: each at a path of its own; stdio: one, or none
    server_name: str = "server"  # `server.name` of a wrapped server; default: the command's name
    identity: Identity = Identity()
    enforcement: Enforcement = Enforcement()
    limits: Limits = Limits()
    protocol: Protocol = Protocol()
    http: Http = Http()
    bridge: Bridge = Bridge()
    telemetry: Telemetry = Telemetry()
    audit: Audit = Audit()
    pod: Pod = Pod()
    admin: Listen | None = None  # None: off; default 127.0.0.1:15820 for http, off for stdio
    log_format: Literal["text", "json"] | None = None  # None: text on a terminal, else JSON
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def describe(settings: Settings) -> dict[str, Any]:
    """The effective settings, for people. A command's arguments may be secrets: not shown."""
    shown = asdict(settings, dict_factory=lambda pairs: {k: _shown(v) for k, v in pairs})
    return {**shown, "command": [*settings.command[:1], *("…" for _ in settings.command[1:])]}


def _shown(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class _Bad(Exception):
    """A value that can not be used."""


class _Later(_Bad):
    """One that is known by name, and not built."""

    def __init__(self, what: str, supported: str) -> None:
        super().__init__(f"{what} is not there yet; supported: {supported}")


class _Problems(list[tuple[str, _Bad]]):
    """Where, as the operator wrote it, and what."""

    def read(self, key: Key, value: Any, where: str) -> Any:
        """Read `value`; what is bad in it is kept here, and read as None."""
        try:
            if isinstance(key, list):
                items = enumerate(_items(value))
                return tuple([self.read(key[0], item, f"{where}[{i}]") for i, item in items])
            return key.read(value, where, self) if isinstance(key, Record) else key(value)
        except _Bad as bad:
            return self.append((where, bad))

    def unknown(self, where: str, name: str, known: Collection[str]) -> None:
        """Keep a name that is in no table."""
        from difflib import get_close_matches

        elsewhere = [each for each in known if each.endswith(f".{name}")]
        near = elsewhere or get_close_matches(name, known, n=1)
        later = _LATER.get(re.sub(r"\[\d+\]", "", where))
        hint = f"; did you mean {near[0]!r}?" if near else ""
        self.append((where, later or _Bad(f"is not known{hint}")))


@dataclass(frozen=True, slots=True)
class Record:
    """A mapping with keys of its own, of which `make` makes one value."""

    keys: Mapping[str, Key]
    required: tuple[str, ...]
    make: Callable[..., Any]

    def read(self, value: Any, where: str, problems: _Problems) -> Any:
        """Read key by key, so that each problem has its place."""
        before, seen = len(problems), {}
        for name, item in _mapping(value).items():
            if name in self.keys:
                seen[name] = problems.read(self.keys[name], item, f"{where}.{name}")
            else:
                problems.unknown(f"{where}.{name}", name, self.keys)
        problems += [(where, _Bad(f"needs the key {n!r}")) for n in self.required if n not in value]
        return self.make(**seen) if len(problems) == before else None


Key = Callable[[Any], Any] | Record | list[Any]  # a list of one: each item is read so


def _a(what: str, fits: Callable[[Any], object]) -> Callable[[Any], Any]:
    """The reader of what is stored as it is written."""

    def read(value: Any) -> Any:
        if fits(value):
            return value
        shown = re.sub("//[^/]*@", "//…@", json.dumps(value, ensure_ascii=False))
        raise _Bad(f"must be {what}, not {shown if len(shown) <= 60 else shown[:57] + '…'}")

    return read


def _text(what: str, pattern: str) -> Callable[[Any], Any]:
    return _a(what, lambda value: isinstance(value, str) and re.fullmatch(pattern, value))


def _one_of(*words: str) -> Callable[[Any], Any]:
    return _text(f"one of {', '.join(words)}", "|".join(words))


def _number(low: float, high: float, *kinds: type) -> Key:
    def fits(value: Any) -> bool:
        typed = isinstance(value, kinds) and not isinstance(value, bool)
        return typed and (value is None or bool(low <= value <= high))

    whole, null = "whole " * (float not in kinds), " or null" * (type(None) in kinds)
    return _a(f"a {whole}number from {low} to {high}{null}", fits)


def _source(value: Any) -> Any:
    if value in _SOURCES_LATER:
        raise _Later(f"the source {value!r}", "static, none")
    return _one_of("static", "none")(value)


def _upstream_url(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("unix-stdio:"):
        raise _Later("unix-stdio://", "http://, https://")
    if re.search("/sse/?$", url := _url(value)):
        raise _Later("the legacy HTTP+SSE transport", "Streamable HTTP")
    return url


def _upstream(url: str, name: str = "", path: str = "") -> Upstream:
    return Upstream(name=name, path=path or _path(urlsplit(url).path or "/"), url=url)


def _address(default: int) -> Callable[[Any], Listen]:
    example = f"127.0.0.1:{default} (this machine) or 0.0.0.0:{default} (everybody)"
    address = _text(f"HOST:PORT that names its address, such as {example}", _ADDRESS)

    def read(value: Any) -> Listen:
        [(host, port)] = re.findall(_ADDRESS, address(value))
        return Listen(host.strip("[]"), int(port or default))

    return read


def _actor(on_behalf_of: Principal | None = None, **said: Any) -> Actor:
    return static(_principal(**said), on_behalf_of)


def _actor_in(value: Any) -> Actor:
    [(kind, name)] = re.findall(_ACTOR, _text("human:ID, service:ID or agent:ID", _ACTOR)(value))
    return _actor(type=kind, id=name)


# ── Tables: what can be said, and where ───────────────────────────────────────────────────────────

_ACTOR = "(?s)(human|service|agent):(.+)"
_PORT = "6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5]?[0-9]{1,4}"
_HOST = r"\[[0-9A-Fa-f:.]+\]|(?![0-9]*(?:[:/]|$))[A-Za-z0-9._-]+"
_ADDRESS = f"({_HOST})(?::({_PORT}))?"
_URL = rf'https?://(?:{_HOST})(?::(?:{_PORT}))?(?:/[!"$->@-~]*)?'
_PATH = r"(?!.*(?://|/\.\.?(?:/|$)))/[A-Za-z0-9._~!$&'()*+,;=:@/-]*"

_principal = partial(Principal, issuer=STATIC_ISSUER)
_any = _text("a text that is not empty", "(?s).+")
_flag = _a("true or false", lambda value: isinstance(value, bool))
_items = _a(
    "a list that says nothing twice",
    lambda value: isinstance(value, list) and len({*map(repr, value)}) == len(value),
)
_mapping = _a("a mapping", lambda value: isinstance(value, dict))
_seconds = _number(0.01, 60, int, float)
_url = _text("http(s)://HOST[:PORT][/PATH] without credentials, query and fragment", _URL)
_path = _text("an absolute path without '//', '.', '..' and '%'", _PATH)

UPSTREAM_KEYS: Mapping[str, Key] = {"name": _any, "path": _path, "url": _upstream_url}
PRINCIPAL_KEYS: Mapping[str, Key] = {
    "type": _one_of("human", "service", "agent"),
    "id": _any,
    "groups": [_any],
    "scopes": [_any],
    "claims": _mapping,
}
ACTOR_KEYS = {**PRINCIPAL_KEYS, "on_behalf_of": Record(PRINCIPAL_KEYS, ("type", "id"), _principal)}
KEYS: Mapping[str, Key] = {
    "upstreams": [Record(UPSTREAM_KEYS, ("url",), _upstream)],
    "listen": _address(15801),
    "admin": lambda value: None if value == "off" else _address(15820)(value),
    "policy.dir": lambda value: Path(_any(value)),
    "policy.opa": _text("a URL, or unix:///PATH of a socket", f"{_URL}|unix:///[!-~]*[!-.0-~]"),
    **dict.fromkeys(("policy.deadline", "policy.listing_deadline"), _seconds),
    **dict.fromkeys(("policy.poll", "policy.canary"), _seconds),
    "identity.source": _source,
    "identity.static": Record(ACTOR_KEYS, ("type", "id"), _actor),
    "enforcement.shadow": _one_of("off", "allowed", "all"),
    "enforcement.disclose": _one_of("full", "codes"),
    "enforcement.denial": _one_of("error", "result"),
    "limits.client_message": _number(1024, 2**28, int),
    "limits.server_message": _number(1024, 2**30, int),
    "limits.nesting": _number(8, 256, int),
    "limits.calls_in_flight": _number(1, 100_000, int),
    "limits.sessions": _number(1, 1_000_000, int),
    "limits.children": _number(1, 100_000, int),
    "limits.connect": _number(0.1, 300, int, float),
    "limits.response": _number(0.1, 86_400, int, float, type(None)),
    "limits.drain": _number(0, 600, int, float),
    "limits.catalog": _number(0, 60, int, float),
    "protocol.big_integers": _one_of("refuse", "pass"),
    "protocol.methods": [_text("a method name", r"\S+")],
    "http.hosts": [_text("a name in lower case, no port", r"\[[0-9a-f:.]+\]|[a-z0-9._-]+")],
    "http.origins": [_text("an origin in lower case", r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+")],
    "bridge.path": _path,
    "telemetry.otlp": _url,
    "telemetry.protocol": _one_of("http/protobuf", "grpc"),
    "telemetry.exporter": _one_of("otlp", "console", "none"),
    "telemetry.ratio": _number(0, 1, int, float),
    **dict.fromkeys(("server.name", "policy.binary", "telemetry.service_name", "audit.path"), _any),
    **dict.fromkeys(("identity.static_for_all", "bridge.shared", "audit.sync"), _flag),
    "http.forward_authorization": _flag,
    **dict.fromkeys(("pod.name", "pod.namespace", "pod.service_account"), _any),
    "log.format": _one_of("text", "json"),
    "log.level": _one_of("debug", "info", "warning", "error"),
}
_GROUPS = {path.partition(".")[0] for path in KEYS if "." in path}
_SOURCES_LATER = ("jwt", "kubernetes", "mtls", "proxy_headers", "token_file")
_LATER: Mapping[str, _Bad] = {
    "upstreams.transport": _Later("a choice of transport", "Streamable HTTP"),
    **{f"identity.{name}": _Later(f"{name!r}", "static, none") for name in _SOURCES_LATER},
}
_SAMPLER = "(parentbased_)?(always_on|always_off|traceidratio)"
_NOT_IN_FILE: Mapping[str, Key] = {
    "actor": _actor_in,
    "upstream": lambda value: (_upstream(_upstream_url(value)),),
    "home": _any,
    "cache": _any,
    "otel.endpoint": _any,
    "otel.sampler": _text(f"one of {_SAMPLER}", _SAMPLER),
    "otel.ratio": _number(0, 1, int, float),
    "otel.disabled": _flag,
}
_PREFIX = "MCP_SIDECAR_"
_READERS: Mapping[str, Key] = {**KEYS, **_NOT_IN_FILE}
_FLAGS: Mapping[str, str] = {
    "policy": "policy.dir",
    "opa": "policy.opa",
    "actor": "actor",
    "admin": "admin",
    "audit": "audit.path",
    "otlp": "telemetry.otlp",
    "shadow": "enforcement.shadow",
    "listen": "listen",
    "upstream": "upstream",
}
_FOREIGN: Mapping[str, str] = {
    "HOME": "home",
    **{f"POD_{each.upper()}": f"pod.{each}" for each in ("name", "namespace", "service_account")},
    "OTEL_SERVICE_NAME": "telemetry.service_name",
    "OTEL_TRACES_EXPORTER": "telemetry.exporter",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "telemetry.protocol",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "telemetry.protocol",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "otel.endpoint",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "otel.endpoint",
    "OTEL_TRACES_SAMPLER": "otel.sampler",
    "OTEL_TRACES_SAMPLER_ARG": "otel.ratio",
    "OTEL_SDK_DISABLED": "otel.disabled",
}
_VARIABLES: Mapping[str, str] = {
    **{_PREFIX + path.replace(".", "__").upper(): path for path in KEYS if callable(KEYS[path])},
    **{_PREFIX + flag.upper(): path for flag, path in _FLAGS.items()},
    _PREFIX + "OPA_BIN": "policy.binary",
    _PREFIX + "CACHE": "cache",
}
_TWO = "two servers: -- COMMAND, and --upstream URL"
_ALONE = "listen on 127.0.0.1, or set identity.static_for_all"
# Kubernetes sets these in every pod beside a Service whose name begins with `mcp-sidecar`.
_SERVICE = re.compile(r"_SERVICE_(HOST|PORT\w*)=|_PORT_\d+_(TCP|UDP|SCTP)\w*=|_PORT=\w+://")
_Said = Iterator[tuple[str, str, Any]]  # where, for people; the key; the value


def load(
    *, mode: Mode, flags: Mapping[str, Any], environ: Mapping[str, str], read: Callable[[Path], str]
) -> Settings:
    """The settings of this run. Of `flags`, None is not given, and what is not known is ignored.

    Raises:
        ConfigError: with every problem; as `NotSupported` if one asks for what is not built.
    """
    problems, command = _Problems(), tuple(flags.get("command") or ())
    name = flags.get("config") or environ.get(_PREFIX + "CONFIG")
    document = problems.read(lambda name: _parse(name, read), str(name), "") if name else {}
    said: dict[str, Any] = {}
    for where, path, value in chain(
        _from_environ(environ, _FOREIGN),
        _from_file(document or {}, "", problems),
        _from_environ(environ, _VARIABLES),
        _from_flags(flags),
    ):
        said[path] = problems.read(_READERS[path], value, where)
    _strangers(environ, problems)
    if document is not None:
        problems += [("", bad) for bad in _disagreements(mode, command, said)]
    if problems:
        lines = [f"{where}: {bad}" if where else str(bad) for where, bad in problems]
        later = any(isinstance(bad, _Later) for _, bad in problems)
        raise NotSupported(lines) if later else ConfigError(lines)
    return _build(mode, command, said)


def _parse(name: str, read: Callable[[Path], str]) -> Any:
    """YAML as far as JSON goes: keys are texts, and none twice; `off` and `no` are texts."""
    import yaml

    try:
        node = yaml.compose(read(Path(name)), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return _mapping({} if node is None else _value(node))
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError, _Bad) as problem:
        raise _Bad(f"{name}: {' '.join(str(problem).split())}") from None


def _value(node: Any) -> Any:
    if node.id == "sequence":
        return [_value(each) for each in node.value]
    if node.id == "scalar":
        is_text = node.style or node.tag.endswith((":str", ":timestamp"))
        return node.value if is_text else _scalar(node.value)
    pairs: dict[str, Any] = {}
    for key, value in node.value:
        if key.id != "scalar" or key.value in pairs:
            raise _Bad(f"line {key.start_mark.line + 1}: a key that is no text, or stands twice")
        pairs[key.value] = _value(value)
    return pairs


def _scalar(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    words = {"true": True, "false": False, "null": None, "~": None, "": None}
    return words.get(text.lower(), text)


def _from_file(document: Mapping[str, Any], above: str, problems: _Problems) -> _Said:
    for name, value in document.items():
        path = above + name
        if path in KEYS:
            yield path, path, value
        elif path in _GROUPS:
            yield from _from_file(problems.read(_mapping, value, path) or {}, f"{path}.", problems)
        else:
            problems.unknown(path, path, [*KEYS, *_GROUPS])


def _from_environ(environ: Mapping[str, str], variables: Mapping[str, str]) -> _Said:
    """A variable's text is taken as it is where the key is a text, else as YAML would."""
    for name, path in variables.items():
        if text := environ.get(name):
            fits = _Problems().read(_READERS[path], text, name) is not None
            yield name, path, text if fits else _scalar(text)


def _from_flags(flags: Mapping[str, Any]) -> _Said:
    for flag, path in _FLAGS.items():
        if value := flags.get(flag):
            yield f"--{flag}", path, "all" if value is True else str(value)


def _strangers(environ: Mapping[str, str], problems: _Problems) -> None:
    for name, text in environ.items():
        known = not name.startswith(_PREFIX) or name in (*_VARIABLES, _PREFIX + "CONFIG")
        if text and not known and not _SERVICE.search(f"{name}={text}"):
            problems.unknown(name, name, _VARIABLES)


def _disagreements(mode: Mode, command: tuple[str, ...], said: Mapping[str, Any]) -> Iterator[_Bad]:
    """What no single value is to blame for."""
    servers, given, listen = _upstreams(said), said.keys(), said.get("listen")
    policies, source = {"policy.dir", "policy.opa"} & given, said.get("identity.source")
    served = command or {"upstream", "upstreams"} & given
    acting = "actor" in given or ("identity.static" in given and source != "none")
    alone = mode == "stdio" or not listen or listen.loopback or said.get("identity.static_for_all")
    rules: tuple[tuple[object, str], ...] = (
        (not policies, "no policy: --policy DIR (own OPA), or --opa URL|unix:///PATH, is needed"),
        (len(policies) > 1, "policy.dir (--policy) and policy.opa (--opa) exclude each other"),
        (source == "static" and not acting, "identity.static (or --actor TYPE:ID) is needed"),
        (not acting and "identity.static" in given, "identity.static: but identity.source is none"),
        (acting and not alone, f"listen: {listen} makes everybody the static actor; {_ALONE}"),
        (mode == "stdio" and not served, "no server: stdio needs -- COMMAND, or --upstream URL"),
        (mode == "stdio" and len(servers) > 1 and not command, "upstreams: stdio takes one"),
        (mode == "http" and not served, "no server: http needs --upstream URL, or -- COMMAND"),
        (command and (servers if mode == "http" else "upstream" in given), _TWO),
        (mode == "http" and "listen" not in given, "no address: http needs --listen HOST:PORT"),
        (len({each.name for each in servers}) < len(servers), "upstreams: two have the same name"),
        (len({each.path for each in servers}) < len(servers), "upstreams: two have the same path"),
    )
    yield from (_Bad(what) for wrong, what in rules if wrong)


def _upstreams(said: Mapping[str, Any]) -> tuple[Upstream, ...]:
    found, name = said.get("upstream") or said.get("upstreams") or (), said.get("server.name")
    names = [each and (each.name or name or urlsplit(each.url).hostname) for each in found]
    return tuple(replace(each, name=name) for each, name in zip(found, names, strict=True) if each)


def _build(mode: Mode, command: tuple[str, ...], said: Mapping[str, Any]) -> Settings:
    def group(name: str) -> dict[str, Any]:
        return {k.removeprefix(name): value for k, value in said.items() if k.startswith(name)}

    identity, log, opa = group("identity."), group("log."), group("policy.")
    actor = said.get("actor") or identity.get("static", UNKNOWN)
    cache = said.get("cache") or said.get("home", "/nonexistent") + "/.cache/mcp-opa-sidecar"
    admin = None if mode == "stdio" else Listen("127.0.0.1", 15820)
    plain: tuple[Any, ...] = (Enforcement, Limits, Protocol, Http, Bridge, Audit, Pod)
    return Settings(
        mode=mode,
        command=command,
        listen=None if mode == "stdio" else said.get("listen"),
        upstreams=() if mode == "stdio" and command else _upstreams(said),
        server_name=said.get("server.name") or (Path(command[0]).name if command else "server"),
        opa=Opa(opa.pop("dir", None), opa.pop("opa", None), tools=Path(cache, "bin"), **opa),
        identity=Identity(actor, identity.get("static_for_all", False)),
        telemetry=_telemetry(group("telemetry."), group("otel.")),
        admin=said.get("admin", admin),
        log_format=log.get("format"),
        log_level=log.get("level", "info"),
        **{kind.__name__.lower(): kind(**group(f"{kind.__name__.lower()}.")) for kind in plain},
    )


def _telemetry(own: dict[str, Any], otel: Mapping[str, Any]) -> Telemetry:
    sampler = otel.get("sampler", "").removeprefix("parentbased_")
    ratios = {"always_off": 0.0, "traceidratio": otel.get("ratio", 1.0)}
    found = {"ratio": ratios.get(sampler, 1.0), "exporter": "none", **own}
    if "exporter" not in own and ("otlp" in own or "endpoint" in otel):
        found["exporter"] = "otlp"
    return Telemetry(**found | ({"exporter": "none"} if otel.get("disabled") else {}))
