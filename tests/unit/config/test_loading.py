"""What each source says, which wins, and what is refused in which words."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sidecar import config
from sidecar.config import KEYS, Settings
from sidecar.errors import ConfigError
from sidecar.policy.identity import UNKNOWN
from tests.support.settings import (
    EXAMPLES,
    STATIC,
    alone,
    assert_set,
    at,
    entries,
    load,
    problems,
    understood,
    with_policy,
)

# ── Which source wins ─────────────────────────────────────────────────────────────────────────────


def test_nothing_but_a_policy_and_a_command_is_needed() -> None:
    settings = with_policy(command=("/usr/bin/desk", "--token", "s3cret"))
    assert settings == Settings(
        mode="stdio",
        command=("/usr/bin/desk", "--token", "s3cret"),
        server_name="desk",
        opa=config.Opa(Path("policies"), tools=Path("/nonexistent/.cache/mcp-opa-sidecar/bin")),
    )
    assert settings.identity.actor is UNKNOWN


def test_a_flag_wins_over_a_variable_and_that_over_the_file_and_that_over_others() -> None:
    document = {"telemetry": {"service_name": "file"}, "audit": {"path": "file"}}
    others = {"OTEL_SERVICE_NAME": "other"}
    own = {"MCP_SIDECAR_TELEMETRY__SERVICE_NAME": "own", "MCP_SIDECAR_AUDIT__PATH": "long"}
    assert with_policy(environ=others).telemetry.service_name == "other"
    assert with_policy(document, environ=others).telemetry.service_name == "file"
    assert with_policy(document, environ={**others, **own}).telemetry.service_name == "own"
    assert with_policy(document, environ=own).audit.path == "long"
    own["MCP_SIDECAR_AUDIT"] = "short"
    assert with_policy(document, environ=own).audit.path == "short"
    assert with_policy(document, environ=own, audit="flag").audit.path == "flag"
    assert with_policy(shadow=True).enforcement.shadow == "all"


def test_a_flag_has_a_variable_of_its_name() -> None:
    said = (
        "opa=http://127.0.0.1:8181 policy=elsewhere actor=agent:a:b audit=- otlp=http://c:4318 "
        "admin=127.0.0.1:9 shadow=all listen=127.0.0.1:1 upstream=http://tickets/mcp"
    )
    for flag, text in (each.split("=") for each in said.split()):
        more: dict[str, Any] = {} if flag in ("opa", "policy") else {"policy": "p"}
        by_flag = load(mode="check", **{**more, flag: text})
        by_variable = load(mode="check", **more, environ={f"MCP_SIDECAR_{flag.upper()}": text})
        assert by_flag == by_variable != load(mode="check", policy="p"), flag


@pytest.mark.parametrize("path", [path for path, value in EXAMPLES.items() if path in KEYS])
def test_each_scalar_has_a_variable(path: str) -> None:
    value = EXAMPLES[path]
    if isinstance(value, list | dict) or path == "identity.source":
        return
    name = "MCP_SIDECAR_" + path.upper().replace(".", "__")
    text = value if isinstance(value, str) else json.dumps(value)
    by_variable = load(mode="check", environ={name: text}, **alone(path))
    assert by_variable == load(at(path, value), mode="check", **alone(path))


def test_the_file_may_be_named_by_a_variable() -> None:
    environ = {"MCP_SIDECAR_CONFIG": "/etc/sidecar.yaml"}
    flags = {"policy": Path("p"), "command": ("x",)}
    settings = config.load(
        mode="stdio", flags=flags, environ=environ, read="log: {{level: debug}} # {}".format
    )
    assert settings.log_level == "debug"


def test_service_links_of_kubernetes_are_not_ours() -> None:
    links = {
        "MCP_SIDECAR_SERVICE_HOST": "10.0.0.1",
        "MCP_SIDECAR_WEBHOOK_SERVICE_PORT_HTTPS": "443",
        "MCP_SIDECAR_PORT": "tcp://10.0.0.1:443",
        "MCP_SIDECAR_PORT_443_TCP_ADDR": "10.0.0.1",
    }
    assert with_policy(environ=links) == with_policy()
    assert len(problems(environ={**links, "MCP_SIDECAR_PORT": "8080"})) == 1


# ── What becomes of it ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "expected"),
    entries("""
        -> admin=None audit.path=None log_format=None opa.deadline=0.5 server_name=server
        LIMITS__RESPONSE=null -> limits.response=None
        LIMITS__RESPONSE=2.5 -> limits.response=2.5
        file={limits:{response:5}} LIMITS__RESPONSE= -> limits.response=5
        POD__NAME=007 SERVER__NAME=true -> pod.name=007 server_name=true
        HOME=/h -> opa.tools=/h/.cache/mcp-opa-sidecar/bin opa.binary=None
        HOME=/h CACHE=/c OPA_BIN=/b/opa -> opa.tools=/c/bin opa.binary=/b/opa
        POD_NAME=n POD_NAMESPACE=s -> pod.name=n pod.namespace=s pod.service_account=None
        POD__LABELS_FILE=/etc/podinfo/labels -> pod.labels_file=/etc/podinfo/labels
        file={pod:{name:f}} POD_NAME=n POD_SERVICE_ACCOUNT=a -> pod.name=f pod.service_account=a
        file={enforcement:{shadow:allowed}} --shadow= -> enforcement.shadow=allowed
        file={enforcement:{shadow:allowed}} --shadow=all -> enforcement.shadow=all
        --admin=127.0.0.1 -> admin.host=127.0.0.1 admin.port=15820
        --mode=http -> admin.host=127.0.0.1 admin.port=15820
        --mode=http --admin=off -> admin=None
        file={admin:off} --mode=http -> admin=None
        --mode=http --admin=0.0.0.0:9 -> admin.host=0.0.0.0 admin.port=9
        --mode=http --listen=localhost:0 -> listen.host=localhost listen.port=0
        --mode=http --listen=127.0.0.1 -> listen.host=127.0.0.1 listen.port=15801
        --mode=http --listen=[::1]:65535 -> listen.host=::1 listen.port=65535
        --mode=http --listen=[::1] -> listen.host=::1 listen.port=15801
        --mode=http --listen=[10.1.2.3]:80 -> listen.host=10.1.2.3 listen.port=80
        --mode=http --listen=[10.1.2.3,fd00::5]:80 -> listen.host=10.1.2.3,fd00::5
        --mode=http --upstream=http://t:9/mcp -> upstreams.0.name=t upstreams.0.path=/mcp
        --mode=http --upstream=http://t -> upstreams.0.path=/ upstreams.0.url=http://t
        SERVER__NAME=desk --mode=http --upstream=https://t/ -> upstreams.0.name=desk
        file={upstreams:[{url:'http://u'}]} --mode=http --upstream=http://t -> upstreams.0.name=t
        file={upstreams:[{name:a,path:/a,url:'http://a/x'},{url:'https://b/y'}]} --mode=http
            --upstream= -> upstreams.0.name=a upstreams.0.path=/a upstreams.0.url=http://a/x
            upstreams.1.name=b upstreams.1.path=/y upstreams.1.url=https://b/y
        file={upstreams:[{url:'http://u'}],listen:0.0.0.0} -> upstreams=() listen=None admin=None
        file={upstreams:[{url:'http://u'}]} --command= -> upstreams.0.name=u listen=None
        --command= --upstream=http://t:9/mcp -> upstreams.0.url=http://t:9/mcp listen=None
        --mode=http --upstream=unix-stdio:///run/x/desk.sock -> upstreams.0.name=desk
            upstreams.0.path=/mcp upstreams.0.transport=stdio
        --mode=http --upstream=desk=unix-stdio:///run/x/y.sock -> upstreams.0.name=desk
            upstreams.0.path=/desk upstreams.0.url=unix-stdio:///run/x/y.sock
        SERVER__NAME=s BRIDGE__PATH=/s --mode=http --upstream=unix-stdio:///x -> upstreams.0.name=s
            upstreams.0.path=/s
        file={bridge:{path:/b},upstreams:[{url:'unix-stdio:///a'},{url:'http://b/y'}]}
            --mode=http --upstream= -> upstreams.0.path=/b upstreams.1.path=/y
        file={upstreams:[{url:'unix-stdio:///a',path:/a,name:n}]} --command=
            -> upstreams.0.path=/a upstreams.0.name=n upstreams.0.transport=stdio
        file={identity:{static_for_all:true}} --mode=http --listen=0.0.0.0 --actor=agent:x
            -> identity.static_for_all=True identity.actor.assurance=1 listen.host=0.0.0.0
        --mode=http --listen=0.0.0.0 -> identity.actor.assurance=0 listen.host=0.0.0.0
    """),
)
def test_what_is_said_is_what_is_set(said: str, expected: str) -> None:
    assert_set(said, expected)


@pytest.mark.parametrize(
    ("said", "expected"),
    entries("""
        -> exporter=none ratio=1.0 protocol=http/protobuf
        --otlp=http://c -> exporter=otlp otlp=http://c
        ENDPOINT=http://c -> exporter=otlp otlp=None
        TRACES_ENDPOINT=http://c/v1 -> exporter=otlp otlp=None
        ENDPOINT=http://c --otlp=http://own -> exporter=otlp otlp=http://own
        OTEL_TRACES_EXPORTER=console --otlp=http://c -> exporter=console
        OTEL_TRACES_EXPORTER=none ENDPOINT=http://c -> exporter=none
        OTEL_TRACES_EXPORTER=otlp -> exporter=otlp otlp=None
        OTEL_SDK_DISABLED=TRUE --otlp=http://c -> exporter=none
        OTEL_SDK_DISABLED=false --otlp=http://c -> exporter=otlp
        PROTOCOL=grpc -> protocol=grpc
        PROTOCOL=grpc TRACES_PROTOCOL=http/protobuf -> protocol=http/protobuf
        OTEL_TRACES_SAMPLER=always_off -> ratio=0.0
        OTEL_TRACES_SAMPLER=parentbased_always_on -> ratio=1.0
        OTEL_TRACES_SAMPLER=parentbased_traceidratio OTEL_TRACES_SAMPLER_ARG=0.25 -> ratio=0.25
        OTEL_TRACES_SAMPLER=traceidratio -> ratio=1.0
        OTEL_TRACES_SAMPLER_ARG=0.25 -> ratio=1.0
        OTEL_TRACES_SAMPLER=always_off TELEMETRY__RATIO=0.5 -> ratio=0.5
    """),
)
def test_the_standard_variables_of_opentelemetry(said: str, expected: str) -> None:
    said = re.sub(r"\b(TRACES_)?(ENDPOINT|PROTOCOL)=", r"OTEL_EXPORTER_OTLP_\g<0>", said)
    assert_set(said, " ".join(f"telemetry.{each}" for each in expected.split()))


def test_the_header_that_is_signed_is_named_by_its_server() -> None:
    assert with_policy("assertion: {key: /k}").assertion == config.Assertion(Path("/k"))
    said = with_policy(at("assertion", EXAMPLES["assertion"]))
    assert said.assertion == config.Assertion(Path("/run/key.pem"), "desk", "tickets", 60)


def test_the_readme_shows_an_assertion_that_is_accepted() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
    [shown] = re.findall(r"^```yaml\n(# assertion\.yaml.*?)^```$", readme, re.S | re.M)
    assert with_policy(shown).assertion == config.Assertion(Path("/run/secrets/key.pem"))


def test_a_static_actor_is_asserted_and_may_act_for_somebody() -> None:
    document = at("identity.static", EXAMPLES["identity.static"])
    actor = with_policy(document).identity.actor
    assert actor.keys == ("static|bot", "static|ann")
    assert (actor.assurance, actor.sources) == (1, ("static",))
    assert actor.principal.groups == ("bots",)
    assert actor.principal.scopes == ("a:b",)
    assert actor.principal.claims == {"team": [1]}


def test_an_actor_by_flag_acts_for_itself_whatever_the_file_says() -> None:
    for document in (at("identity.static", STATIC), at("identity.source", "none")):
        actor = with_policy(document, actor="service:a:b").identity.actor
        assert [each.id for each in actor.chain] == ["a:b"]
        assert actor.principal.type == "service"


# ── What is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("document", "problem"),
    entries("""
        polcy: {} -> polcy: is not known; did you mean 'policy'?
        policy: {deadlin: 1} -> policy.deadlin: is not known; did you mean 'policy.deadline'?
        shadow: all -> shadow: is not known; did you mean 'enforcement.shadow'?
        catalog: {pin: a} -> catalog.pin: is not known; did you mean 'catalog.pins'?
        catalog: {refresh: 0} -> catalog.refresh: must be a number from 0.1 to 86400, not 0
        resources: [a] -> resources: must be a mapping, not ["a"]
        resources: {t: 'a b'} -> resources: must be a template such as ticket:{id}, not "a b"
        zzz: 1 -> zzz: is not known
        limits: 5 -> limits: must be a mapping, not 5
        limits: -> limits: must be a mapping, not null
        policy: {poll: 0} -> policy.poll: must be a number from 0.01 to 60, not 0
        policy: {poll: 1s} -> policy.poll: must be a number from 0.01 to 60, not "1s"
        audit: {sync: yes} -> audit.sync: must be true or false, not "yes"
        limits: {nesting: 9.5} -> limits.nesting: must be a whole number from 8 to 256, not 9.5
        log: {level: warn} -> log.level: must be one of debug, info, warning, error, not "warn"
        http: {hosts: [a, 'B']} -> http.hosts[1]: must be a name in lower case, no port, not "B"
        http: {hosts: [a, a]} -> http.hosts: must be a list that says nothing twice, not ["a", "a"]
        upstreams: [{url: http://a, pth: /}] -> upstreams[0].pth: is not known; did you mean 'path'?
        upstreams: [{name: a}] -> upstreams[0]: needs the key 'url'
        upstreams: [{url: http://a/x, path: /p}, {url: http://b, path: /p}]
            -> upstreams: two have the same path
        upstreams: [{url: http://a:1/x}, {url: http://a:2/y}] -> upstreams: two have the same name
        upstreams: [{url: unix-stdio:///a, transport: sse}]
            -> upstreams[0]: transport: unix-stdio:// is no HTTP
        upstreams: [{url: unix-stdio:///a, token_file: t}]
            -> upstreams[0]: token_file: unix-stdio:// is no HTTP
        upstreams: [{url: unix-stdio:///a}, {url: unix-stdio:///b}]
            -> upstreams: two have the same path
        upstreams: [{url: http://a/%78}]
            -> upstreams[0]: must be an absolute path without '//', '.', '..' and '%', not "/%78"
        identity: {static: {type: agent}} -> identity.static: needs the key 'id'
        identity: {source: none, static: {type: agent, id: a}}
            -> identity.static: but identity.source is none
        identity: {source: static} -> identity.static (or --actor TYPE:ID) is needed
        telemetry: {otlp: 'http://ann:s3cret@c'}
            -> telemetry.otlp: must be http(s)://HOST[:PORT][/PATH] without credentials, query and
            fragment, not "http://…@c"
        assertion: {lifetime: 30} -> assertion: needs the key 'key'
        assertion: {key: k, lifetime: 4}
            -> assertion.lifetime: must be a whole number from 5 to 300, not 4
        assertion: {key: k, issuer: 'a|b'}
            -> assertion.issuer: must be a text without '|', not "a|b"
        {assertion: {key: k, audience: a}, upstreams: [{url: 'http://a/x'}, {url: 'http://b/y'}]}
            -> assertion.audience: of several upstreams, each is known by its own name
        policy: {opa: 'http://o'} -> policy.dir (--policy) and policy.opa (--opa) exclude each other
        policy: {stamp: s} -> policy.stamp: is for policy.opa; an own OPA is watched as it is
    """),
)
def test_a_problem_in_the_file_is_told_with_its_path(document: str, problem: str) -> None:
    assert problems(document, mode="check") == (problem,)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("a: 1\nb: {\n", "line 3"),
        ("log: {}\naudit: {}\nlog: {}\n", "line 3: a key that is no text, or stands twice"),
        ("log:\n  level: info\n  level: debug\n", "line 3: a key that is no text, or stands twice"),
        ("? [a]\n: 1\n", "line 1: a key that is no text"),
        ("- a\n", 'must be a mapping, not ["a"]'),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("pod: &p {name: *p}", "recursion"),
        ("log: {level: \x07}", "characters are not allowed"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_told_with_its_name(document: str, words: str) -> None:
    [problem] = problems(document)
    assert problem.startswith("sidecar.yaml: ")
    assert words in problem


@pytest.mark.parametrize(
    "error", [FileNotFoundError("not there"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")]
)
def test_a_file_that_can_not_be_read(error: Exception) -> None:
    def read(_: Path) -> str:
        raise error

    with pytest.raises(ConfigError, match=r"^c\.yaml: "):
        config.load(mode="stdio", flags={"config": "c.yaml"}, environ={}, read=read)


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("off", "no", "2026-11-22", "1:30", ".nan", "nan")),
        *(("'5'", "5"), ("!!str 5", "5"), ("5", 5), ("-0.5", -0.5), ("true", True), ("~", None)),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_yaml_is_read_as_editors_read_it(
    monkeypatch: pytest.MonkeyPatch, loader: str, text: str, value: Any
) -> None:
    if loader == "SafeLoader":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    document = f"identity: {{static: {{type: human, id: a, claims: {{x: {text}}}}}}}"
    assert with_policy(document).identity.actor.principal.claims == {"x": value}


@pytest.mark.parametrize(
    ("said", "problem"),
    entries("""
        --policy= -> no policy: --policy DIR (own OPA), or --opa URL|unix:///PATH, is needed
        --opa=http://o -> policy.dir (--policy) and policy.opa (--opa) exclude each other
        --policy= --opa=unix:/a -> --opa: must be a URL, or unix:///PATH of a socket, not "unix:/a"
        --actor=bob -> --actor: must be human:ID, service:ID or agent:ID, not "bob"
        --actor=root:a -> --actor: must be human:ID, service:ID or agent:ID, not "root:a"
        --command= -> no server: stdio needs -- COMMAND, or --upstream URL
        file={upstreams:[{url:'http://a/x'},{url:'http://b'}]} --command=
            -> upstreams: stdio takes one
        --mode=http --upstream= -> no server: http needs --upstream URL, or -- COMMAND
        file={assertion:{key:k}} --mode=http --listen=127.0.0.1 --command=c --upstream=
            -> assertion: it is for servers behind HTTP; who else reaches a pipe?
        file={assertion:{key:k}} --mode=http --listen=127.0.0.1 --upstream=unix-stdio:///a
            -> assertion: it is for servers behind HTTP; who else reaches a pipe?
        --mode=http --listen= -> no address: http needs --listen HOST:PORT
        --mode=http --listen=0.0.0.0 --actor=agent:x
            -> listen: 0.0.0.0:15801 makes everybody the static actor; listen on 127.0.0.1, or set
            identity.static_for_all
        MCP_SIDECAR_SHADOOW=all
            -> MCP_SIDECAR_SHADOOW: is not known; did you mean 'MCP_SIDECAR_SHADOW'?
        MCP_SIDECAR_LIMITS__NESTING=x
            -> MCP_SIDECAR_LIMITS__NESTING: must be a whole number from 8 to 256, not "x"
        MCP_SIDECAR_TELEMETRY__RATIO=nan
            -> MCP_SIDECAR_TELEMETRY__RATIO: must be a number from 0 to 1, not NaN
        OTEL_TRACES_EXPORTER=zipkin
            -> OTEL_TRACES_EXPORTER: must be one of otlp, console, none, not "zipkin"
    """),
)
def test_a_problem_of_a_flag_or_variable_is_told_by_its_name(said: str, problem: str) -> None:
    assert problems(**understood(said)) == (problem,)


def test_every_problem_is_told_at_once() -> None:
    document = {
        "policy": {"deadline": "x", "dri": "p"},
        "limits": {"nesting": 0, "drain": -1},
        "upstreams": [{"name": 1, "url": "x"}, {"path": "y"}],
        "http": {"hosts": ["A", "B"]},
    }
    found = problems(document, policy=None, mode="check", environ={"MCP_SIDECAR_X__Y": "1"})
    assert " ".join(line.partition(": ")[0] for line in found) == (
        "policy.deadline policy.dri limits.nesting limits.drain upstreams[0].name upstreams[0].url "
        "upstreams[1].path upstreams[1] http.hosts[0] http.hosts[1] MCP_SIDECAR_X__Y no policy"
    )


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("unix-stido:///run/a.sock", "unix-stdio://"),
        ("unix-stdio:/run/a.sock", "unix-stdio://"),
        ("unix:///run/a.sock", "unix-stdio://"),
        ("htp://tickets/mcp", "http://"),
        ("ftp://tickets/mcp", "http://"),
        ("unix-stdio:///run/", None),
        ("unix-stdio://host/run/a.sock", None),
        ("http://tickets/mcp?x", None),
        ("tickets", None),
    ],
)
def test_the_scheme_of_a_server_that_was_meant_is_told(url: str, hint: str | None) -> None:
    [problem] = problems(mode="check", upstream=url)
    assert problem.startswith("--upstream: must be http(s)://HOST")
    assert problem.endswith(f"; did you mean {hint}…?") is (hint is not None)
    assert ("did you mean" in problem) is (hint is not None)


@given(st.text())
def test_any_text_is_settings_or_a_configuration_error(text: str) -> None:
    with suppress(ConfigError):
        assert with_policy(text).opa.policy == Path("policies")


def test_slow_imports_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert with_policy("log: {level: debug}").log_level == "debug"
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert with_policy(environ={"MCP_SIDECAR_LOG__LEVEL": "error"}).log_level == "error"
