"""Issuers, rules and proxies of the configuration, and which sources exclude each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sidecar.config import Identity, Mode, Proxy, Spiffe, Tls, describe
from sidecar.errors import ConfigError
from sidecar.policy.actors import TypeRule
from sidecar.policy.issuers import Issuer, KeySource, Review
from tests.support.settings import EXAMPLES, entries, load, problems, with_policy

IDP = "issuer: https://idp, audiences: [desk]"
ISSUER = "{jwt: [{" + IDP + "}]}"


def test_what_is_said_of_an_issuer_is_what_is_believed() -> None:
    document = {"identity": {name: EXAMPLES[f"identity.{name}"] for name in ("jwt", "kubernetes")}}
    [oidc, cluster] = with_policy(document, mode="check").identity.issuers
    assert oidc == Issuer(
        "https://idp.example",
        ("desk",),
        keys=KeySource(
            url="https://idp.example/keys",
            ca="/ca.pem",
            bearer="/token",
            insecure=True,
            timeout=1,
            max_size=1024,
            max_age=60,
            stale=600,
            interval=2,
            retry=1,
        ),
        algorithms=("ES256",),
        leeway=5,
        groups="roles",
        claims=("team",),
        purpose="intent",
        clients=("cid",),
        agents=("bot",),
        interactive=("web",),
        actor_issuers=("https://partner.example",),
    )
    assert cluster == Issuer(
        "https://kubernetes.default.svc",
        ("desk",),
        kind="kubernetes",
        review=Review(
            "https://10.0.0.1",
            ca="/ca.pem",
            token_file="/token",
            timeout=1,
            remember=5,
            concurrent=2,
            rate=20,
        ),
        pod_required=True,
    )


def test_an_issuer_needs_a_name_and_an_audience_and_no_more() -> None:
    [found] = with_policy(f"identity: {ISSUER}", mode="check").identity.issuers
    assert found == Issuer("https://idp", ("desk",))


def test_rules_keep_their_order_and_the_types_of_their_values() -> None:
    said = "[{type: agent, claim: a, equals: 1}, {type: human, claim: a, equals: true}, "
    said += "{type: service, claim: a, equals: '1'}, {type: unknown, subject: '**'}]"
    rules = with_policy(f"identity: {{types: {said}}}", mode="check").identity.types
    assert rules == (
        TypeRule("agent", claim="a", equals=1),
        TypeRule("human", claim="a", equals=True),
        TypeRule("service", claim="a", equals="1"),
        TypeRule("unknown", subject="**"),
    )
    assert [type(each.equals) for each in rules] == [int, bool, str, type(None)]


def test_a_proxy_is_known_by_its_addresses() -> None:
    said = "{name: edge, peers: [10.1.0.0/16, '::1', 192.0.2.7]}"
    found = with_policy(f"identity: {{proxy: {said}}}", mode="check").identity.proxy
    assert found == Proxy("edge", ("10.1.0.0/16", "::1/128", "192.0.2.7/32"))


@pytest.mark.parametrize(
    ("said", "demanded"),
    [("{}", False), (ISSUER, True), (ISSUER[:-1] + ", required: false}", False)],
)
def test_a_token_is_needed_as_soon_as_there_is_an_issuer(said: str, demanded: bool) -> None:
    assert with_policy(f"identity: {said}", mode="check").identity.demanded is demanded
    assert Identity(required=True).demanded


@pytest.mark.parametrize(
    ("document", "problem"),
    entries("""
        jwt: [{issuer: https://idp}] -> identity.jwt[0]: needs the key 'audiences'
        jwt: [{audiences: [a]}] -> identity.jwt[0]: needs the key 'issuer'
        jwt: [{issuer: https://idp, audiences: []}]
            -> identity.jwt[0]: an issuer has at least one audience: else any token of it would do
        jwt: [{issuer: 'a|b', audiences: [a]}]
            -> identity.jwt[0]: an issuer has a name, without '|'
        jwt: [{issuer: idp, audiences: [a]}]
            -> identity.jwt[0]: without a url or a file of keys, an issuer is an https URL
        jwt: [{issuer: i, audiences: [a], jwks: {url: 'http://idp/keys'}}]
            -> identity.jwt[0].jwks: keys are fetched by https, or by http from loopback
        jwt: [{issuer: i, audiences: [a], jwks: {url: 'https://idp/keys', file: /k}}]
            -> identity.jwt[0].jwks: keys come from a url or from a file, not from both
        jwt: [{issuer: i, audiences: [a], jwks: {file: /k, interval: 0.5}}]
            -> identity.jwt[0].jwks: interval and retry are at least 1 s: tokens must not drive
            fetches
        jwt: [{issuer: i, audiences: [a], jwks: {fil: /k}}]
            -> identity.jwt[0].jwks.fil: is not known; did you mean 'file'?
        jwt: [{issuer: https://idp, audiences: [a], agent: [b]}]
            -> identity.jwt[0].agent: is not known; did you mean 'agents'?
        jwt: [{issuer: https://idp, audiences: [a], algorithms: [HS256]}]
            -> identity.jwt[0].algorithms[0]: must be one of RS256, RS384, RS512, PS256, PS384,
            PS512, ES256, ES384, ES512, EdDSA, not "HS256"
        jwt: [{issuer: https://idp, audiences: [a], algorithms: []}]
            -> identity.jwt[0]: algorithms are of RS256, RS384, RS512, PS256, PS384, PS512, ES256,
            ES384, ES512, EdDSA
        jwt: [{issuer: https://idp, audiences: [a], leeway: 301}]
            -> identity.jwt[0].leeway: must be a number from 0 to 300, not 301
        jwt: [{issuer: https://idp, audiences: [a]}, {issuer: https://idp, audiences: [b]}]
            -> identity: an issuer is configured twice
        kubernetes: {issuer: https://idp, audiences: [a], agents: [b]}
            -> identity.kubernetes.agents: is not known
        kubernetes: {issuer: k, audiences: [a], jwks: {file: /k}, token_review: {}}
            -> identity.kubernetes: a cluster has tokens reviewed, or verified by keys (jwks), not
            both
        kubernetes: {issuer: k, audiences: [a], token_review: {url: 'http://10.0.0.1'}}
            -> identity.kubernetes.token_review: the API server is asked by https, or by http on
            loopback
        kubernetes: {issuer: k, audiences: [a], token_review: {remember: 61}}
            -> identity.kubernetes.token_review.remember: must be a number from 0 to 60, not 61
        kubernetes: {issuer: k, audiences: [a], token_review: {token: /t}}
            -> identity.kubernetes.token_review.token: is not known; did you mean 'token_file'?
        types: [{type: agent}] -> identity.types[0]: a rule without a condition would fit everybody
        types: [{type: agent, claim: azp}]
            -> identity.types[0]: a client that is an agent is listed with its issuer, under
            `agents`
        types: [{type: agent, claim: a, equals: 1.5}]
            -> identity.types[0].equals: must be a text, a whole number, true or false, not 1.5
        proxy: {name: edge} -> identity.proxy: needs the key 'peers'
        proxy: {name: edge, peers: [10.1.2.3/8]}
            -> identity.proxy.peers[0]: must be an address, or a network such as 10.1.0.0/16
        proxy: {name: edge, peers: [edge.example]}
            -> identity.proxy.peers[0]: must be an address, or a network such as 10.1.0.0/16
        spiffe: {} -> identity.spiffe: needs the key 'trust_domains'
        spiffe: {trust_domains: []} -> identity.spiffe: there is at least one trust domain
        spiffe: {trust_domains: ['spiffe://a']}
            -> identity.spiffe.trust_domains[0]: must be a trust domain such as prod.example.com,
            not "spiffe://a"
        mtls: {} -> identity.mtls: is not known; did you mean 'identity.types'?
        source: mtls -> identity.source: must be one of static, none, not "mtls"
        token_fd: 2 -> identity.token_fd: must be a whole number from 3 to 1048576, not 2
        scopes: ['a b'] -> identity.scopes[0]: must be a scope without spaces and quotes, not "a b"
        source: jwt -> identity.source: must be one of static, none, not "jwt"
    """),
)
def test_a_problem_is_told_with_its_path(document: str, problem: str) -> None:
    assert problems(f"identity: {{{document}}}", mode="check") == (problem,)


@pytest.mark.parametrize(
    ("mode", "document", "problem"),
    [
        *(
            (
                "check",
                f"static: {{type: human, id: ana}}, {said}",
                f"identity.{path}: there is a static actor, and it excludes the rest",
            )
            for path, said in [
                ("jwt", ISSUER[1:-1]),
                ("kubernetes", f"kubernetes: {{{IDP}}}"),
                ("proxy", "proxy: {name: edge, peers: [10.1.2.3]}"),
                ("spiffe", "spiffe: {trust_domains: [a]}"),
                ("required", "required: true"),
                ("token_file", "token_file: /t"),
                ("token_fd", "token_fd: 7"),
            ]
        ),
        (
            "check",
            "token_file: /t, token_fd: 7",
            "identity.token_file and identity.token_fd exclude each other",
        ),
        (
            "http",
            ISSUER[1:-1] + ", token_fd: 7",
            "identity.token_fd: for stdio; with http, clients send tokens",
        ),
        *(
            (
                mode,
                said,
                (
                    "identity.required: nobody could come in: jwt, kubernetes, proxy or spiffe says"
                    " whose credentials count"
                ),
            )
            for mode in ("check", "http", "stdio")
            for said in ("required: true", "required: true, jwt: []", "required: true, types: []")
        ),
        ("stdio", "token_file: /t", "identity.token_file: no issuer is configured"),
        (
            "stdio",
            ISSUER[1:-1],
            "identity: stdio needs token_file or token_fd to have a token that can be verified",
        ),
    ],
)
def test_sources_that_do_not_go_together(mode: Mode, document: str, problem: str) -> None:
    assert problems(f"identity: {{{document}}}", mode=mode) == (problem,)


@pytest.mark.parametrize(
    "said",
    [
        "required: false",
        ISSUER[1:-1],
        "proxy: {name: edge, peers: [10.1.2.3]}, required: true",
        f"kubernetes: {{{IDP}}}, required: true",
    ],
)
def test_whoever_can_show_something_may_have_to(said: str) -> None:
    assert with_policy(f"identity: {{{said}}}", mode="check").mode == "check"


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("{cert: /c}", "tls: needs the key 'key'"),
        ("{key: /k}", "tls: needs the key 'cert'"),
        (
            "{cert: /c, key: /k, client: required}",
            "tls: client certificates that are required need a client_ca",
        ),
        (
            "{cert: /c, key: /k, client: sometimes}",
            'tls.client: must be one of optional, required, not "sometimes"',
        ),
        ("{cert: /c, key: /k, ca: /a}", "tls.ca: is not known"),
    ],
)
def test_tls_needs_what_belongs_together(said: str, problem: str) -> None:
    assert problems(f"tls: {said}", mode="http") == (problem,)


def test_tls_is_for_the_listener() -> None:
    said = "tls: {cert: /c, key: /k}"
    assert with_policy(said, mode="http").tls == Tls(Path("/c"), Path("/k"))
    assert with_policy(said).tls is None


def test_a_flag_for_the_actor_excludes_issuers_too() -> None:
    with pytest.raises(ConfigError, match=r"identity\.jwt: there is a static actor"):
        load(f"identity: {ISSUER}", mode="check", policy="p", actor="human:ana")


def test_the_readme_shows_what_is_accepted() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
    [shown] = re.findall(r"^```yaml\n(# identity\.yaml.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    identity = with_policy(shown, mode="check").identity
    assert [each.kind for each in identity.issuers] == ["oidc", "kubernetes"]
    assert identity.types[0].type == "agent"


def test_the_readme_shows_certificates_that_are_accepted() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
    [shown] = re.findall(r"^```yaml\n(# tls\.yaml.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    settings = with_policy(shown, mode="check")
    assert settings.tls == Tls(
        Path("/run/spiffe/tls.crt"), Path("/run/spiffe/tls.key"), Path("/run/spiffe/bundle.crt")
    )
    assert settings.identity.spiffe == Spiffe(("prod.example.com",))


def test_the_settings_can_be_shown() -> None:
    document = {"identity": {name: EXAMPLES[f"identity.{name}"] for name in ("jwt", "proxy")}}
    shown = json.dumps(describe(with_policy(document, mode="check")))
    assert "https://idp.example/keys" in shown
    assert "10.1.0.0/16" in shown


def test_a_cluster_that_is_asked_needs_nothing_else_said() -> None:
    said = "{kubernetes: {issuer: k, audiences: [desk], token_review: {}}}"
    [found] = with_policy(f"identity: {said}", mode="check").identity.issuers
    assert found == Issuer("k", ("desk",), kind="kubernetes", review=Review())
