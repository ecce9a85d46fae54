"""Loading settings in tests, and the tables of what can be said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sidecar import config
from sidecar.config import KEYS, Mode, Record, Settings, describe
from sidecar.errors import ConfigError

SCHEMA: dict[str, Any] = json.loads(
    Path(config.__file__).with_name("schema.json").read_text("utf-8")
)
STATIC = {"type": "agent", "id": "bot", "on_behalf_of": {"type": "human", "id": "ann"}}
HTTP = {"listen": "127.0.0.1:0", "upstream": "http://tickets:9000/mcp"}

# One value per key that is not its default: each has to change the settings.
GROUPS: Mapping[str, Any] = yaml.safe_load("""
    server: {name: tickets}
    upstreams: [{name: a, path: /a, url: 'http://a:1/mcp', transport: sse},
      {url: 'https://b/mcp', token_file: /run/b, pins: /etc/b.json}]
    listen: 127.0.0.1:8080
    admin: 'off'
    policy: {dir: other, opa: 'unix:///run/mcp-opa/opa.sock', binary: /opt/opa, deadline: 0.25,
      listing_deadline: 1, poll: 0.1, canary: 5, decision_log: console,
      stamp: /policy/data.json}
    identity: {required: false, resource: 'https://tickets.example/mcp', scopes: ['tickets:read'],
      jwt: [{issuer: 'https://idp.example', audiences: [desk], algorithms: [ES256], leeway: 5,
          jwks: {url: 'https://idp.example/keys', ca: /ca.pem, bearer: /token, insecure: true,
            timeout: 1, max_size: 1024, max_age: 60, stale: 600, interval: 2, retry: 1},
          groups: roles, claims: [team], purpose: intent, clients: [cid], agents: [bot],
          interactive: [web], actor_issuers: ['https://partner.example']}],
      kubernetes: {issuer: 'https://kubernetes.default.svc', audiences: [desk], pod_required: true,
        token_review: {url: 'https://10.0.0.1', ca: /ca.pem, token_file: /token, timeout: 1,
          remember: 5, concurrent: 2, rate: 20}},
      types: [{type: agent, source: jwt, issuer: 'https://**', subject: 'bot-*', claim: kind,
          equals: bot}, {type: service, claim: tier, glob: 's*'}],
      proxy: {name: edge, peers: ['10.1.0.0/16', '::1'], id_header: x-user,
        groups_header: x-groups, certificate_header: x-cert},
      spiffe: {trust_domains: [prod.example, dev_1]},
      token_file: /run/token, token_fd: 7, source: none, static_for_all: true,
      static: {type: agent, id: bot, groups: [bots],
      scopes: ['a:b'], claims: {team: [1]}, on_behalf_of: {type: human, id: ann}}}
    enforcement: {shadow: allowed, disclose: codes, denial: result}
    limits: {client_message: 2048, server_message: 4096, nesting: 32, calls_in_flight: 7,
      calls_per_actor: 5, streams: 6,
      sessions: 8, children: 9, body: 12, connect: 1.5, response: 30, drain: 0, catalog: 1}
    catalog: {pins: /etc/pins.json, refresh: 60, validate: true}
    resources: {refund_ticket: 'ticket:{id}', pay: 'account:{from.id}'}
    protocol: {big_integers: pass, methods: [vendor/ping]}
    http: {hosts: [tickets.example, '[::1]'], forward_authorization: false,
      unverified_headers: [x-tenant],
      origins: ['https://app.example:8443', 'vscode-webview://abc']}
    assertion: {key: /run/key.pem, issuer: desk, audience: tickets, lifetime: 60}
    bridge: {path: /tickets, shared: true}
    tls: {cert: /tls.pem, key: /tls.key, client_ca: /ca.pem, client: required}
    telemetry: {otlp: 'http://collector:4318', protocol: grpc, exporter: console, ratio: 0.1,
      service_name: desk, arguments: true, results: true}
    audit: {path: '-', sync: true, arguments: true, results: true}
    masking: {shown: [arguments.id, result], secrets: [badgeno]}
    control: /run/mcp-sidecar/control.sock
    pod: {name: tickets-7c9, namespace: support, service_account: tickets,
      labels_file: /etc/podinfo/labels}
    log: {format: json, level: debug}
""")
EXAMPLES: Mapping[str, Any] = {
    f"{group}.{key}" if key else group: value
    for group, said in GROUPS.items()
    for key, value in (
        said.items() if isinstance(said, dict) and group not in KEYS else [("", said)]
    )
}
# What a static actor excludes.
VERIFIED = ("jwt", "kubernetes", "proxy", "spiffe", "required", "token_file", "token_fd")
# Values that are right for some key, and wrong for most.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 64, 128.5, 10**12, "", " ", "x", "0", "off", "none", "all"),
    *("0.0.0.0:80", ":80", "80", "[::1]:0", "[::1]", "::1", "h", "h:65535", "h:65536", "h:", "a/b"),
    *("[::1,10.1.2.3]:1", "[::1,10.1.2.3]", "[,]", "::1,::2"),
    *("http://h", "http://h/sse", "http://h/sse/", "http://h/p?q", "http://h/#f", "http://u@h/"),
    *("https://h:65536", "https://[::1]:1/a@b", "http://", "http://:80", "http:// h", "ftp://h"),
    *("unix:///a/b", "unix:///", "unix:///a/", "unix:a", "unix://h/a", "unix-stdio:///a", "stdout"),
    *([], {}, ["a"], ["a", "a"], [1], [""], ["A b"], ["https://a.example"], ["*"], [None]),
    *(["cookie"], ["x-tenant"], ["X-Tenant"], ["authorization"], ["authorization-hint"]),
    *({"a": 1}, [[]], [{}], {"b": None}),
    *([{"url": "http://h/mcp"}], [{"url": "http://h/sse"}], [{"name": "a"}], [{"url": 1}]),
    *([{"url": "http://h", "path": path} for path in ("a", "/a/", "//a", "/a/..", "/%61", "/a?b")]),
    [{"url": "http://h", "transport": "sse"}],
    *([{"url": "unix-stdio:///a", **more}] for more in ({}, {"transport": "sse"}, {"pins": "p"})),
    *([{"url": "unix-stdio:///a", "token_file": "t"}], [{"url": "unix-stdio:a"}]),
    *({"type": kind, "id": name} for kind in ("human", "unknown", 1) for name in ("x", "", None)),
    *({"type": "agent"}, {"id": "x"}, {**STATIC, "groups": "bots"}, {**STATIC, "issuer": "me"}),
    *({**STATIC, "on_behalf_of": who} for who in (None, STATIC, {"type": "human", "id": "ann"})),
)  # fmt: skip


def load(
    document: str | Mapping[str, Any] | None = None,
    *,
    mode: Mode = "stdio",
    environ: Mapping[str, str] | None = None,
    **flags: Any,
) -> Settings:
    """Load `document` as the file, with a server and a policy unless the test names its own."""
    if document is not None:
        flags["config"] = "sidecar.yaml"
    if mode == "stdio":
        flags.setdefault("command", ("server",))
    if mode == "http" and not flags.get("command"):
        flags = {**HTTP, **flags}
    text = document if isinstance(document, str) else json.dumps(document)
    return config.load(mode=mode, flags=flags, environ=environ or {}, read=lambda _: text)


def with_policy(document: str | Mapping[str, Any] | None = None, **more: Any) -> Settings:
    return load(document, **{"policy": "policies", **more})


def problems(document: str | Mapping[str, Any] | None = None, **more: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        with_policy(document, **more)
    return caught.value.problems


def alone(*paths: str) -> dict[str, Any]:
    """The flag that says who decides, unless one of `paths` does."""
    return {} if {"policy.dir", "policy.opa"} & set(paths) else {"opa": "http://o"}


def at(path: str, value: Any) -> dict[str, Any]:
    group, _, key = path.partition(".")
    return {group: {key: value} if key else value}


def entries(text: str) -> list[tuple[str, str]]:
    """A table: `left -> right` each, of which what is indented deeper continues the line above."""
    lines = re.sub(r"\n {9,}", " ", text).strip("\n ").splitlines()
    pairs = [line.strip().split("-> ", 1) for line in lines]
    return [(left.strip(), right) for left, right in pairs]


def understood(said: str) -> dict[str, Any]:
    """`--flag=TEXT`, `file={YAML}`, and variables, of which only those of others have a prefix."""
    found: dict[str, Any] = {"environ": {}}
    for name, text in (each.split("=", 1) for each in said.split()):
        if name == "file":
            found["document"] = text.replace(":", ": ").replace(": //", "://")
        elif name.startswith("--"):
            found[name[2:]] = text
        else:
            ours = not name.startswith(("OTEL_", "POD_N", "POD_S", "HOME", "MCP_"))
            found["environ"]["MCP_SIDECAR_" * ours + name] = text
    return found


def assert_set(said: str, expected: str) -> None:
    shown = describe(with_policy(**understood(said)))
    for path, text in (each.split("=", 1) for each in expected.split()):
        found: Any = shown
        for step in path.split("."):
            found = found[int(step) if step.isdigit() else step]
        assert str(found) == text, path


def rules(schema: Mapping[str, Any] = SCHEMA, above: str = "") -> Iterator[tuple[str, Any]]:
    """The path and the rule of each key that the schema knows, down to those of records."""
    for name, rule in schema.get("properties", {}).items():
        whole = {**rule, **SCHEMA["$defs"].get(rule.get("$ref", "").removeprefix("#/$defs/"), {})}
        below = list(rules(whole.get("items", whole), f"{above}{name}."))
        if not below or f"{above}{name}" in KEYS or above.count("."):
            yield f"{above}{name}", {**whole, **rule}
        yield from below


def table(keys: Mapping[str, Any] = KEYS, above: str = "") -> Iterator[str]:
    for name, key in keys.items():
        yield above + name
        one = key[0] if isinstance(key, list) else key
        if isinstance(one, Record):
            yield from table(one.keys, f"{above}{name}.")


@cache
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def accepted(document: Mapping[str, Any]) -> bool:
    """Whether `load` takes it, with all that the schema can not ask for given by flags."""
    policy = document.get("policy")
    flags = alone(*(f"policy.{key}" for key in (policy if isinstance(policy, dict) else ())))
    identity = document.get("identity")
    if identity is not None and not (isinstance(identity, dict) and {*VERIFIED} & {*identity}):
        flags["actor"] = "agent:x"
    if isinstance(identity, dict) and {*identity} == {"required"}:
        document = {"identity": {**identity, "proxy": EXAMPLES["identity.proxy"]}}
    try:
        load(document, mode="check", **flags)
    except ConfigError:
        return False
    return True
