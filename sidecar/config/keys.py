"""The tables: what can be said, and where. Their readers are all that looks at a value.

`schema.json` says the same to editors; a unit test holds the two together.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sidecar.config.readers import (
    Bad,
    Key,
    Record,
    a_value,
    mapping,
    number,
    one_of,
    text,
)
from sidecar.config.settings import (
    STDIO,
    Assertion,
    Listen,
    Proxy,
    Spiffe,
    Tls,
    Upstream,
    UpstreamTransport,
)
from sidecar.policy.actors import TypeRule
from sidecar.policy.identity import STATIC_ISSUER, Actor, Principal, static
from sidecar.policy.issuers import Issuer, KeySource, Review
from sidecar.policy.jwks import ALGORITHMS
from sidecar.protocol.mapping import TEMPLATE

_ACTOR = "(?s)(human|service|agent):(.+)"
_PORT = "6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5]?[0-9]{1,4}"
_HOST_NAME = r"(?![0-9]*(?:[:/]|$))[A-Za-z0-9._-]+"
_HOST = rf"\[[0-9A-Fa-f:.]+\]|{_HOST_NAME}"
_HOSTS = rf"\[[0-9A-Fa-f:.]+(?:,[0-9A-Fa-f:.]+)*\]|{_HOST_NAME}"
_ADDRESS = f"({_HOSTS})(?::({_PORT}))?"
_URL = rf'https?://(?:{_HOST})(?::(?:{_PORT}))?(?:/[!"$->@-~]*)?'
_SOCKET = "/[!-~]*[!-.0-~]"
_PATH = r"(?!.*(?://|/\.\.?(?:/|$)))/[A-Za-z0-9._~!$&'()*+,;=:@/-]*"

_PRIVATE = "authorization|proxy-authorization|cookie|mcp-session-id|mcp-sidecar-assertion|x-api-key"
_HEADER = f"(?!(?:{_PRIVATE})$)[a-z0-9_-]+"

_NAME = "[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_SHOWN = r"(?:arguments|result)(?:\.[^.]+)*"

_principal = partial(Principal, issuer=STATIC_ISSUER)
_any = text("a text that is not empty", "(?s).+")
_flag = a_value("true or false", lambda value: isinstance(value, bool))
_seconds = number(0.01, 60, int, float)
_lasting = number(0.1, 31_536_000, int, float)
_header = text("the name of a header, in lower case", "[a-z0-9-]+")
_WITHOUT = "http(s)://HOST[:PORT][/PATH] without credentials, query and fragment"
_url = text(_WITHOUT, _URL)
_server_url = text(f"{_WITHOUT}, or {STDIO}/PATH of a socket", f"{_URL}|{STDIO}{_SOCKET}")
_SCHEMES = ("http://", "https://", STDIO)
_path = text("an absolute path without '//', '.', '..' and '%'", _PATH)


def _file(value: Any) -> Path:
    return Path(_any(value))


def _upstream_url(value: Any) -> Any:
    try:
        return _server_url(value)
    except Bad as bad:
        scheme = re.match("[^:]*:/*", value) if isinstance(value, str) else None
        near = scheme and get_close_matches(scheme[0], _SCHEMES, n=1)
        if not near or (scheme and scheme[0].startswith(near[0])):
            raise
        raise Bad(f"{bad}; did you mean {near[0]}…?") from None


def _upstream(
    url: str,
    *,
    name: str = "",
    path: str = "",
    transport: UpstreamTransport | None = None,
    token_file: Path | None = None,
    pins: Path | None = None,
) -> Upstream:
    """Where nothing is said, the path is the server's, and `/sse` speaks the oldest transport.

    A stdio server has no path of its own: it is served where the bridge is.
    """
    if url.startswith(STDIO):
        if transport or token_file:
            raise ValueError(f"{'transport' if transport else 'token_file'}: {STDIO} is no HTTP")
        return Upstream(name, path, url, "stdio", pins=pins)
    legacy = re.search("/sse/?$", url) is not None
    return Upstream(
        name=name,
        path=path or _path(urlsplit(url).path or "/"),
        url=url,
        transport=transport or ("sse" if legacy else "streamable_http"),
        token_file=token_file,
        pins=pins,
    )


def _upstreams(value: Any) -> tuple[Upstream, ...]:
    """`URL`, or several `NAME=URL`, of which each is served below `/NAME`."""
    return tuple(map(_named_upstream, _any(value).split()))


def _named_upstream(text: str) -> Upstream:
    name, equals, url = text.partition("=")
    if not equals or not re.fullmatch(_NAME, name):
        return _upstream(_upstream_url(text))
    below = "" if url.startswith(STDIO) else urlsplit(url).path
    return _upstream(_upstream_url(url), name=name, path=f"/{name}{below}".rstrip("/"))


def _address(default: int) -> Callable[[Any], Listen]:
    example = f"127.0.0.1:{default} (this machine) or 0.0.0.0:{default} (everybody)"
    address = text(f"HOST:PORT that names its address, such as {example}", _ADDRESS)

    def read(value: Any) -> Listen:
        [(host, port)] = re.findall(_ADDRESS, address(value))
        return Listen(host.strip("[]"), int(port or default))

    return read


def _actor(on_behalf_of: Principal | None = None, **said: Any) -> Actor:
    return static(_principal(**said), on_behalf_of)


def _actor_in(value: Any) -> Actor:
    [(kind, name)] = re.findall(_ACTOR, text("human:ID, service:ID or agent:ID", _ACTOR)(value))
    return _actor(type=kind, id=name)


def _resources(value: Any) -> Mapping[str, str]:
    template = text("a template such as ticket:{id}", TEMPLATE)
    return {name: template(each) for name, each in mapping(value).items()}


def _issuer(issuer: str, **said: Any) -> Issuer:
    keys, review = said.pop("jwks", KeySource()), said.pop("token_review", None)
    return Issuer(issuer, keys=keys, review=review, **said)


def _network(value: Any) -> str:
    try:
        return str(ipaddress.ip_network(_any(value)))
    except ValueError:
        raise Bad("must be an address, or a network such as 10.1.0.0/16") from None


UPSTREAM_KEYS: Mapping[str, Key] = {
    "name": _any,
    "path": _path,
    "url": _upstream_url,
    "transport": one_of("streamable_http", "sse"),
    "token_file": _file,
    "pins": _file,
}
PRINCIPAL_KEYS: Mapping[str, Key] = {
    "type": one_of("human", "service", "agent"),
    "id": _any,
    "groups": [_any],
    "scopes": [_any],
    "claims": mapping,
}
JWKS_KEYS: Mapping[str, Key] = {
    **dict.fromkeys(("url", "file", "ca", "bearer"), _any),
    "insecure": _flag,
    "timeout": _lasting,
    "max_size": number(1, 2**24, int),
    **dict.fromkeys(("max_age", "stale", "interval", "retry"), _lasting),
}
_ISSUER_KEYS: Mapping[str, Key] = {
    "issuer": _any,
    "audiences": [_any],
    "jwks": Record(JWKS_KEYS, (), KeySource),
    "algorithms": [one_of(*ALGORITHMS)],
    "leeway": number(0, 300, int, float),
    "claims": [_any],
    "purpose": _any,
}
JWT_KEYS: Mapping[str, Key] = {
    **_ISSUER_KEYS,
    "groups": _any,
    **{name: [_any] for name in ("clients", "agents", "interactive", "actor_issuers")},
}
REVIEW_KEYS: Mapping[str, Key] = {
    "url": _url,
    **dict.fromkeys(("ca", "token_file"), _any),
    "timeout": number(0.1, 60, int, float),
    "remember": number(0, 60, int, float),
    "concurrent": number(1, 1000, int),
    "rate": number(1, 10_000, int),
}
KUBERNETES_KEYS: Mapping[str, Key] = {
    **_ISSUER_KEYS,
    "pod_required": _flag,
    "token_review": Record(REVIEW_KEYS, (), Review),
}
TYPE_KEYS: Mapping[str, Key] = {
    "type": one_of("human", "service", "agent", "unknown"),
    "source": one_of("mtls", "kubernetes", "jwt", "proxy"),
    **dict.fromkeys(("issuer", "subject", "claim", "glob"), _any),
    "equals": a_value(
        "a text, a whole number, true or false", lambda value: isinstance(value, str | int)
    ),
}
PROXY_KEYS: Mapping[str, Key] = {
    "name": text("a text without '|'", r"[^|]+"),
    "peers": [_network],
    **dict.fromkeys(("id_header", "groups_header", "certificate_header"), _header),
}
SPIFFE_KEYS: Mapping[str, Key] = {
    "trust_domains": [text("a trust domain such as prod.example.com", "[a-z0-9._-]{1,255}")],
}
TLS_KEYS: Mapping[str, Key] = {
    **dict.fromkeys(("cert", "key", "client_ca"), _file),
    "client": one_of("optional", "required"),
}
ASSERTION_KEYS: Mapping[str, Key] = {
    "key": _file,
    "issuer": text("a text without '|'", r"[^|]+"),
    "audience": _any,
    "lifetime": number(5, 300, int),
}
_issued = ("issuer", "audiences")
ACTOR_KEYS = {**PRINCIPAL_KEYS, "on_behalf_of": Record(PRINCIPAL_KEYS, ("type", "id"), _principal)}
KEYS: Mapping[str, Key] = {
    "upstreams": [Record(UPSTREAM_KEYS, ("url",), _upstream)],
    "listen": _address(15801),
    "admin": lambda value: None if value == "off" else _address(15820)(value),
    **dict.fromkeys(("policy.dir", "policy.stamp"), _file),
    "policy.opa": text("a URL, or unix:///PATH of a socket", f"{_URL}|unix://{_SOCKET}"),
    **dict.fromkeys(("policy.deadline", "policy.listing_deadline"), _seconds),
    **dict.fromkeys(("policy.poll", "policy.canary"), _seconds),
    "policy.decision_log": one_of("off", "console"),
    "identity.source": one_of("static", "none"),
    "identity.static": Record(ACTOR_KEYS, ("type", "id"), _actor),
    "identity.jwt": [Record(JWT_KEYS, _issued, _issuer)],
    "identity.kubernetes": Record(KUBERNETES_KEYS, _issued, partial(_issuer, kind="kubernetes")),
    "identity.types": [Record(TYPE_KEYS, ("type",), TypeRule)],
    "identity.proxy": Record(PROXY_KEYS, ("name", "peers"), Proxy),
    "identity.spiffe": Record(SPIFFE_KEYS, ("trust_domains",), Spiffe),
    "identity.resource": _url,
    "identity.scopes": [text("a scope without spaces and quotes", r"[!#-\[\]-~]+")],
    "identity.token_file": _file,
    "identity.token_fd": number(3, 2**20, int),
    "enforcement.shadow": one_of("off", "allowed", "all"),
    "enforcement.disclose": one_of("full", "codes"),
    "enforcement.denial": one_of("error", "result"),
    "limits.client_message": number(1024, 2**28, int),
    "limits.server_message": number(1024, 2**30, int),
    "limits.nesting": number(8, 256, int),
    "limits.calls_in_flight": number(1, 100_000, int),
    "limits.calls_per_actor": number(1, 100_000, int),
    "limits.streams": number(1, 1_000_000, int),
    "limits.sessions": number(1, 1_000_000, int),
    "limits.children": number(1, 100_000, int),
    "limits.body": number(0.1, 3600, int, float),
    "limits.connect": number(0.1, 300, int, float),
    "limits.response": number(0.1, 86_400, int, float, type(None)),
    "limits.drain": number(0, 600, int, float),
    "limits.catalog": number(0, 60, int, float),
    "catalog.pins": _file,
    "catalog.validate": _flag,
    "catalog.refresh": number(0.1, 86_400, int, float),
    "resources": _resources,
    "protocol.big_integers": one_of("refuse", "pass"),
    "protocol.methods": [text("a method name", r"\S+")],
    "http.hosts": [text("a name in lower case, no port", r"\[[0-9a-f:.]+\]|[a-z0-9._-]+")],
    "http.origins": [text("an origin in lower case", r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+")],
    "http.unverified_headers": [text("a header in lower case that holds no secret", _HEADER)],
    "assertion": Record(ASSERTION_KEYS, ("key",), Assertion),
    "bridge.path": _path,
    "tls": Record(TLS_KEYS, ("cert", "key"), Tls),
    "telemetry.otlp": _url,
    "telemetry.protocol": one_of("http/protobuf", "grpc"),
    "telemetry.exporter": one_of("otlp", "console", "none"),
    "telemetry.ratio": number(0, 1, int, float),
    **dict.fromkeys(("telemetry.arguments", "telemetry.results"), _flag),
    **dict.fromkeys(("audit.arguments", "audit.results"), _flag),
    "masking.shown": [text("a path such as arguments.id or result.structuredContent", _SHOWN)],
    "masking.secrets": [text("a name in lower case, without separators", "[a-z0-9]+")],
    "control": lambda value: None if value == "off" else _file(value),
    **dict.fromkeys(("server.name", "policy.binary", "telemetry.service_name", "audit.path"), _any),
    **dict.fromkeys(("identity.static_for_all", "bridge.shared", "audit.sync"), _flag),
    **dict.fromkeys(("identity.required", "http.forward_authorization"), _flag),
    **dict.fromkeys(("pod.name", "pod.namespace", "pod.service_account"), _any),
    "pod.labels_file": _file,
    "log.format": one_of("text", "json"),
    "log.level": one_of("debug", "info", "warning", "error"),
}
GROUPS = {path.partition(".")[0] for path in KEYS if "." in path}
_SAMPLER = "(parentbased_)?(always_on|always_off|traceidratio)"
_NOT_IN_FILE: Mapping[str, Key] = {
    "actor": _actor_in,
    "upstream": _upstreams,
    "home": _any,
    "cache": _any,
    "otel.endpoint": _any,
    "otel.sampler": text(f"one of {_SAMPLER}", _SAMPLER),
    "otel.ratio": number(0, 1, int, float),
    "otel.disabled": _flag,
}
PREFIX = "MCP_SIDECAR_"
READERS: Mapping[str, Key] = {**KEYS, **_NOT_IN_FILE}
FLAGS: Mapping[str, str] = {
    "policy": "policy.dir",
    "opa": "policy.opa",
    "actor": "actor",
    "admin": "admin",
    "audit": "audit.path",
    "control": "control",
    "otlp": "telemetry.otlp",
    "shadow": "enforcement.shadow",
    "listen": "listen",
    "upstream": "upstream",
}
FOREIGN: Mapping[str, str] = {
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


def _is_scalar(path: str) -> bool:
    return callable(KEYS[path]) and path != "resources"


VARIABLES: Mapping[str, str] = {
    **{PREFIX + path.replace(".", "__").upper(): path for path in KEYS if _is_scalar(path)},
    **{PREFIX + flag.upper(): path for flag, path in FLAGS.items()},
    PREFIX + "OPA_BIN": "policy.binary",
    PREFIX + "CACHE": "cache",
}
