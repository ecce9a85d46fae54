"""The settings: frozen values, documented field by field, with their defaults."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sidecar.policy.actors import TypeRule
from sidecar.policy.identity import UNKNOWN, Actor
from sidecar.policy.issuers import Issuer
from sidecar.policy.masking import Masking

Mode = Literal["stdio", "http", "check"]
UpstreamTransport = Literal["streamable_http", "sse", "stdio"]

STDIO = "unix-stdio://"
"""How the URL of a stdio server begins that is behind the socket of `mcp-sidecar shim`."""


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on, or several with one port."""

    host: str  # a name, or IP addresses without brackets, with commas between them
    port: int  # 0: any free port; the log line `listening` says which

    def __str__(self) -> str:
        bare = re.fullmatch("[^:,]+", self.host)
        return f"{self.host}:{self.port}" if bare else f"[{self.host}]:{self.port}"

    @property
    def hosts(self) -> list[str]:
        """One by one."""
        return self.host.split(",")

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach it; of names, only `localhost` is believed."""
        with suppress(ValueError):
            return all(ipaddress.ip_address(each).is_loopback for each in self.hosts)
        return self.host.lower() == "localhost"


@dataclass(frozen=True, slots=True)
class Upstream:
    """One MCP server behind HTTP, or behind the socket of a shim."""

    name: str  # `server.name` of the input document; never what the server says of itself
    path: str  # where the sidecar serves it; default: the path of `url`, or `bridge.path`
    url: str  # http(s)://HOST[:PORT]/PATH of the server's endpoint, or unix-stdio:///PATH
    transport: UpstreamTransport = "streamable_http"  # default: `sse` where the path ends in /sse
    token_file: Path | None = None  # bearer token for the server, read again when it changes
    pins: Path | None = None  # its `catalog.pins`, where there are several

    @property
    def socket(self) -> Path | None:
        """Of the shim; None where the server is behind HTTP."""
        return Path(self.url.removeprefix(STDIO)) if self.transport == "stdio" else None


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
    stamp: Path | None = None  # file of data with `mcp.revision`, which `url` is to serve in 5 s
    decision_log: Literal["off", "console"] = "off"  # `console`: the own OPA's, masked, to stderr


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that says in headers for whom it speaks. Nobody else's headers are believed."""

    name: str  # the issuer of the principals that it names
    peers: tuple[str, ...]  # its addresses, as networks: 10.1.0.0/16, ::1
    id_header: str = "x-forwarded-user"  # who it is
    groups_header: str | None = None  # the groups, with commas between them
    certificate_header: str | None = None  # the certificate that it was shown, in Envoy's form


@dataclass(frozen=True, slots=True)
class Spiffe:
    """Workloads that show an X509-SVID, or come through a proxy that was shown one."""

    trust_domains: tuple[str, ...]  # those that are believed, such as prod.example.com

    def __post_init__(self) -> None:
        if not self.trust_domains:
            raise ValueError("there is at least one trust domain")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is on the other end."""

    actor: Actor = UNKNOWN  # the static actor; unknown, so that policy says no, unless configured
    static_for_all: bool = False  # accept the static actor on an address that others can reach
    issuers: tuple[Issuer, ...] = ()  # whose tokens are believed
    types: tuple[TypeRule, ...] = ()  # what principals are; the first that fits, else the defaults
    proxy: Proxy | None = None
    spiffe: Spiffe | None = None  # whose client certificates are believed
    required: bool | None = None  # refuse who shows nothing; None: as soon as tokens are verified
    resource: str | None = None  # http: the URL that clients dial, without paths if they are many
    scopes: tuple[str, ...] = ()  # http: what the metadata and challenges tell clients to ask for
    token_file: Path | None = None  # stdio: the client's token, read again when it changes
    token_fd: int | None = None  # stdio: the same from an inherited descriptor, a token a line

    @property
    def demanded(self) -> bool:
        """Whether who shows no credential is refused."""
        return bool(self.issuers) if self.required is None else self.required


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
    calls_per_actor: int = 500  # the same for the calls of one actor, so that none starves the rest
    streams: int = 10_000  # open streams and subscriptions; beyond it no more are opened
    sessions: int = 10_000  # HTTP sessions that are remembered
    children: int = 100  # stdio servers behind `http` at once: one for each session
    body: float = 30.0  # seconds for an HTTP request's body to arrive, once its headers have
    connect: float = 5.0  # seconds to reach the upstream
    response: float | None = None  # seconds until its answer begins; None: tools may take hours
    drain: float = 10.0  # seconds that a shutdown waits for what is in flight
    catalog: float = 2.0  # seconds that a first call waits for the list of tools


@dataclass(frozen=True, slots=True)
class Catalog:
    """What is known of the servers' tools."""

    pins: Path | None = None  # what `mcp-sidecar pin` wrote of the one server; re-read when changed
    validate: bool = False  # hold arguments against the tools' schemas: `tool.arguments_valid`
    refresh: float = 300.0  # seconds until the tools are listed again, beside a call


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
    forward_authorization: bool | None = None  # to the upstream; None: unless it is verified here
    unverified_headers: tuple[str, ...] = ()  # names, lower case, that the policy is shown


@dataclass(frozen=True, slots=True)
class Assertion:
    """The header that the sidecar signs for servers behind HTTP."""

    key: Path  # private key in PEM: EC P-256, Ed25519 or RSA; read again when it changes
    issuer: str = "mcp-opa-sidecar"  # `iss`
    audience: str | None = None  # `aud`; None: the upstream's name
    lifetime: int = 30  # seconds that one is good for


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS where clients come in. The files are read again when they change."""

    cert: Path  # PEM: the certificate, and those between it and the root
    key: Path  # PEM, not encrypted: its private key
    client_ca: Path | None = None  # PEM: who signs clients' certificates; None: none are asked for
    client: Literal["optional", "required"] = "optional"  # `required`: no connection without one

    def __post_init__(self) -> None:
        if self.client == "required" and self.client_ca is None:
            raise ValueError("client certificates that are required need a client_ca")


@dataclass(frozen=True, slots=True)
class Bridge:
    """A stdio server behind HTTP (`http -- COMMAND`, `http --upstream unix-stdio:///PATH`)."""

    path: str = "/mcp"  # where it is served
    shared: bool = False  # one more server, shared by all clients of the stateless revision


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where spans go."""

    otlp: str | None = None  # base URL of the collector; None: `OTEL_EXPORTER_OTLP_*` name it
    protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"  # gRPC is slow to import
    exporter: Literal["otlp", "console", "none"] = "none"  # `otlp` as soon as a collector is named
    ratio: float = 1.0  # share of allowed calls that is exported; denials and errors always are
    arguments: bool = False  # of tool calls, masked, on spans
    results: bool = False  # the same of what came back
    service_name: str = "mcp-opa-sidecar"  # the resource's `service.name`


@dataclass(frozen=True, slots=True)
class Audit:
    """Where the record goes."""

    path: str | None = None  # file; "-": stdout of `http`, stderr of `stdio` (stdout carries MCP)
    sync: bool = False  # fsync each record: safe against a crash of the machine, costs a disk write
    arguments: bool = False  # of tool calls and prompts, masked, in the decision's record
    results: bool = False  # the same of what came back, in the outcome's


@dataclass(frozen=True, slots=True)
class Pod:
    """`context.pod` of the input document; None: not in a pod, the key is absent."""

    name: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    labels_file: Path | None = None  # its labels by the downward API, read again when they change


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
    catalog: Catalog = Catalog()
    resources: Mapping[str, str] = field(default_factory=dict)  # what a tool acts on: a template
    protocol: Protocol = Protocol()
    http: Http = Http()
    assertion: Assertion | None = None  # None: nothing is signed
    bridge: Bridge = Bridge()
    tls: Tls | None = None  # http: None: plain HTTP
    telemetry: Telemetry = Telemetry()
    audit: Audit = Audit()
    masking: Masking = field(
        default_factory=Masking
    )  # what is shown of arguments and results that are written down
    control: Path | None = None  # unix socket of the control API, 0600; None: off
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
