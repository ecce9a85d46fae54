"""From file, environment and flags to settings, with every problem at once.

Nothing here opens a file or reads the environment: both are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sidecar.config.keys import FLAGS, FOREIGN, GROUPS, KEYS, PREFIX, READERS, VARIABLES
from sidecar.config.readers import Bad, Problems, mapping
from sidecar.config.settings import (
    Assertion,
    Audit,
    Bridge,
    Catalog,
    Enforcement,
    Http,
    Identity,
    Limits,
    Listen,
    Mode,
    Opa,
    Pod,
    Protocol,
    Settings,
    Telemetry,
    Upstream,
)
from sidecar.errors import ConfigError
from sidecar.policy.identity import UNKNOWN
from sidecar.policy.issuers import Issuer
from sidecar.policy.masking import Masking

_SOURCES = tuple(f"identity.{name}" for name in ("jwt", "kubernetes", "proxy", "spiffe"))
_VERIFIED = (*_SOURCES, "identity.required")
_PIPED = ("identity.token_file", "identity.token_fd")
_NOBODY = "nobody could come in: jwt, kubernetes, proxy or spiffe says whose credentials count"
_TWO = "two servers: -- COMMAND, and --upstream URL"
_OWN_STAMP = "policy.stamp: is for policy.opa; an own OPA is watched as it is"
_ALONE = "listen on 127.0.0.1, or set identity.static_for_all"
# Kubernetes sets these in every pod beside a Service whose name begins with `mcp-sidecar`.
_SERVICE = re.compile(r"_SERVICE_(HOST|PORT\w*)=|_PORT_\d+_(TCP|UDP|SCTP)\w*=|_PORT=\w+://")
_Said = Iterator[tuple[str, str, Any]]  # where, for people; the key; the value


def load(
    *, mode: Mode, flags: Mapping[str, Any], environ: Mapping[str, str], read: Callable[[Path], str]
) -> Settings:
    """The settings of this run. Of `flags`, None is not given, and what is not known is ignored.

    Raises:
        ConfigError: with every problem.
    """
    problems, command = Problems(), tuple(flags.get("command") or ())
    name = flags.get("config") or environ.get(PREFIX + "CONFIG")
    document = problems.read(lambda name: _parse(name, read), str(name), "") if name else {}
    said: dict[str, Any] = {}
    for where, path, value in chain(
        _from_environ(environ, FOREIGN),
        _from_file(document or {}, "", problems),
        _from_environ(environ, VARIABLES),
        _from_flags(flags),
    ):
        said[path] = problems.read(READERS[path], value, where)
    _strangers(environ, problems)
    if document is not None:
        problems += [("", bad) for bad in _disagreements(mode, command, said)]
    if problems:
        raise ConfigError([f"{where}: {bad}" if where else str(bad) for where, bad in problems])
    return _build(mode, command, said)


def _parse(name: str, read: Callable[[Path], str]) -> Any:
    """YAML as far as JSON goes: keys are texts, and none twice; `off` and `no` are texts."""
    import yaml

    try:
        node = yaml.compose(read(Path(name)), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return mapping({} if node is None else _value(node))
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError, Bad) as problem:
        raise Bad(f"{name}: {' '.join(str(problem).split())}") from None


def _value(node: Any) -> Any:
    if node.id == "sequence":
        return [_value(each) for each in node.value]
    if node.id == "scalar":
        is_text = node.style or node.tag.endswith((":str", ":timestamp"))
        return node.value if is_text else _scalar(node.value)
    pairs: dict[str, Any] = {}
    for key, value in node.value:
        if key.id != "scalar" or key.value in pairs:
            raise Bad(f"line {key.start_mark.line + 1}: a key that is no text, or stands twice")
        pairs[key.value] = _value(value)
    return pairs


def _scalar(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    words = {"true": True, "false": False, "null": None, "~": None, "": None}
    return words.get(text.lower(), text)


def _from_file(document: Mapping[str, Any], above: str, problems: Problems) -> _Said:
    for name, value in document.items():
        path = above + name
        if path in KEYS:
            yield path, path, value
        elif path in GROUPS:
            yield from _from_file(problems.read(mapping, value, path) or {}, f"{path}.", problems)
        else:
            problems.unknown(path, path, [*KEYS, *GROUPS])


def _from_environ(environ: Mapping[str, str], variables: Mapping[str, str]) -> _Said:
    """A variable's text is taken as it is where the key is a text, else as YAML would."""
    for name, path in variables.items():
        if text := environ.get(name):
            fits = Problems().read(READERS[path], text, name) is not None
            yield name, path, text if fits else _scalar(text)


def _from_flags(flags: Mapping[str, Any]) -> _Said:
    for flag, path in FLAGS.items():
        value = flags.get(flag)
        if said := " ".join(value) if isinstance(value, list) else value:
            yield f"--{flag}", path, "all" if said is True else str(said)


def _strangers(environ: Mapping[str, str], problems: Problems) -> None:
    for name, text in environ.items():
        known = not name.startswith(PREFIX) or name in (*VARIABLES, PREFIX + "CONFIG")
        if text and not known and not _SERVICE.search(f"{name}={text}"):
            problems.unknown(name, name, VARIABLES)


def _disagreements(mode: Mode, command: tuple[str, ...], said: Mapping[str, Any]) -> Iterator[Bad]:
    """What no single value is to blame for."""
    servers, given, listen = _upstreams(said), said.keys(), said.get("listen")
    policies, source = {"policy.dir", "policy.opa"} & given, said.get("identity.source")
    served = command or {"upstream", "upstreams"} & given
    acting = "actor" in given or ("identity.static" in given and source != "none")
    alone = mode == "stdio" or not listen or listen.loopback or said.get("identity.static_for_all")
    rules: tuple[tuple[object, str], ...] = (
        (not policies, "no policy: --policy DIR (own OPA), or --opa URL|unix:///PATH, is needed"),
        (len(policies) > 1, "policy.dir (--policy) and policy.opa (--opa) exclude each other"),
        ("policy.stamp" in given and "policy.dir" in given, _OWN_STAMP),
        (source == "static" and not acting, "identity.static (or --actor TYPE:ID) is needed"),
        (not acting and "identity.static" in given, "identity.static: but identity.source is none"),
        (acting and not alone, f"listen: {listen} makes everybody the static actor; {_ALONE}"),
        *_credentials(mode, said, acting=acting),
        *_asserted(mode, command, said.get("assertion"), servers),
        (mode == "stdio" and not served, "no server: stdio needs -- COMMAND, or --upstream URL"),
        (mode == "stdio" and len(servers) > 1 and not command, "upstreams: stdio takes one"),
        (mode == "http" and not served, "no server: http needs --upstream URL, or -- COMMAND"),
        (command and (servers if mode == "http" else "upstream" in given), _TWO),
        (mode == "http" and "listen" not in given, "no address: http needs --listen HOST:PORT"),
        (len({each.name for each in servers}) < len(servers), "upstreams: two have the same name"),
        (len({each.path for each in servers}) < len(servers), "upstreams: two have the same path"),
        (len(servers) > 1 and "catalog.pins" in given, "catalog.pins: say it of each upstream"),
    )
    yield from (Bad(what) for wrong, what in rules if wrong)


def _credentials(
    mode: Mode, said: Mapping[str, Any], *, acting: bool
) -> Iterator[tuple[object, str]]:
    """What is wrong with the sources of identity taken together."""
    names, piped = [each.name for each in _issuers(said)], [each for each in _PIPED if each in said]
    for path in (*_VERIFIED, *_PIPED):
        yield acting and path in said, f"{path}: there is a static actor, and it excludes the rest"
    nobody = not acting and not any(said.get(each, ()) != () for each in _SOURCES)
    yield said.get("identity.required") and nobody, f"identity.required: {_NOBODY}"
    yield len({*names}) < len(names), "identity: an issuer is configured twice"
    yield len(piped) > 1, "identity.token_file and identity.token_fd exclude each other"
    yield mode == "http" and piped, f"{', '.join(piped)}: for stdio; with http, clients send tokens"
    stdio = mode == "stdio" and not acting
    yield stdio and piped and not names, f"{', '.join(piped)}: no issuer is configured"
    yield (
        stdio and names and not piped,
        "identity: stdio needs token_file or token_fd to have a token that can be verified",
    )


def _asserted(
    mode: Mode,
    command: tuple[str, ...],
    assertion: Assertion | None,
    servers: tuple[Upstream, ...],
) -> Iterator[tuple[object, str]]:
    """What is wrong with the header that the sidecar signs."""
    command = command if mode == "http" else ()
    piped = command or (servers and all(each.socket for each in servers))
    several = assertion and assertion.audience is not None and len(servers) > 1
    yield assertion and piped, "assertion: it is for servers behind HTTP; who else reaches a pipe?"
    yield several, "assertion.audience: of several upstreams, each is known by its own name"


def _issuers(said: Mapping[str, Any]) -> tuple[Issuer, ...]:
    cluster = said.get("identity.kubernetes")
    found = (*(said.get("identity.jwt") or ()), *((cluster,) if cluster else ()))
    return tuple(each for each in found if each)


def _upstreams(said: Mapping[str, Any]) -> tuple[Upstream, ...]:
    found, name = said.get("upstream") or said.get("upstreams") or (), said.get("server.name")
    path = said.get("bridge.path") or Bridge().path
    return tuple(
        replace(each, name=each.name or name or _name(each), path=each.path or path)
        for each in found
        if each
    )


def _name(upstream: Upstream) -> str:
    """By what it is known where it has no name: its host, or the name of its socket."""
    socket = upstream.socket
    return str(urlsplit(upstream.url).hostname) if socket is None else socket.stem


def _build(mode: Mode, command: tuple[str, ...], said: Mapping[str, Any]) -> Settings:
    def group(name: str) -> dict[str, Any]:
        return {k.removeprefix(name): value for k, value in said.items() if k.startswith(name)}

    identity, log, opa = group("identity."), group("log."), group("policy.")
    actor = said.get("actor") or identity.get("static", UNKNOWN)
    known = {each.name for each in fields(Identity)}
    more = {name: value for name, value in identity.items() if name in known}
    cache = said.get("cache") or said.get("home", "/nonexistent") + "/.cache/mcp-opa-sidecar"
    admin = None if mode == "stdio" else Listen("127.0.0.1", 15820)
    plain: tuple[Any, ...] = (
        Enforcement,
        Limits,
        Catalog,
        Protocol,
        Http,
        Bridge,
        Audit,
        Masking,
        Pod,
    )
    return Settings(
        mode=mode,
        command=command,
        listen=None if mode == "stdio" else said.get("listen"),
        upstreams=() if mode == "stdio" and command else _upstreams(said),
        server_name=said.get("server.name") or (Path(command[0]).name if command else "server"),
        opa=Opa(opa.pop("dir", None), opa.pop("opa", None), tools=Path(cache, "bin"), **opa),
        identity=Identity(actor, issuers=_issuers(said), **more),
        telemetry=_telemetry(group("telemetry."), group("otel.")),
        admin=said.get("admin", admin),
        control=said.get("control"),
        assertion=said.get("assertion"),
        resources=said.get("resources", {}),
        tls=None if mode == "stdio" else said.get("tls"),
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
