"""Policy by bundle: what OPA is told, which no pod has a word in, and what can't be meant."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.errors import ConfigError
from sidecar.injector.bundles import Bundle, Places, Revocation, settings
from sidecar.injector.injection import Injection, Json, read
from sidecar.injector.plan import plan
from tests.support.pods import BUNDLE, ENABLED, PUBLIC_KEY, container, pod

SAID: Json = {"url": "https://bundles.example", "resource": "mcp.tar.gz", "key": PUBLIC_KEY}


def test_what_is_said_is_taken() -> None:
    more: Json = {"algorithm": "ES256", "scope": "a", "polling": 10, "token": True, "ca": "ours"}
    found = read({"bundle": {**SAID, **more}, "revocation": {"resource": "{namespace}/r"}})
    assert found.bundle == Bundle(**SAID, **more)
    assert found.revocation == Revocation("{namespace}/r", None, 5)
    assert read({"bundle": SAID}).bundle == Bundle(**SAID)


WRONG = {
    "url": ("ftp://h", "https://h?a", "https://h/$(X)", "https://h/${X}", "https://h,a"),
    "resource": ("", "/a", "a//b", "a,b=c", "$(HOME)", "{name}", "a b", "true", "7"),
    "scope": ("", "a/b", "a,b", "$(X)", "null", "1"),
}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        pytest.param({"bundle": {}}, "bundle: needs the key 'url'", id="empty"),
        pytest.param({"bundle": {**SAID, "key": None}}, "bundle.key: must be", id="no key"),
        pytest.param(
            {"bundle": {**SAID, "key": PUBLIC_KEY.replace("PUBLIC", "PRIVATE")}},
            "bundle.key: must be a public key",
            id="a private key",
        ),
        pytest.param({"bundle": {**SAID, "algorithm": "HS256"}}, "bundle.algorithm", id="shared"),
        pytest.param({"bundle": {**SAID, "polling": 0}}, "bundle.polling: must be", id="at once"),
        pytest.param({"bundle": {**SAID, "rot": "x"}}, "bundle.rot: is not known", id="a typo"),
        pytest.param({"revocation": {"resource": "r"}}, "beside that of the policy", id="alone"),
        pytest.param(
            {"bundle": SAID, "revocation": {}}, "revocation: needs the key 'resource'", id="nothing"
        ),
        *(
            pytest.param({"bundle": {**SAID, name: bad}}, f"{name}: must be", id=f"{name} {bad!r}")
            for name, values in WRONG.items()
            for bad in values
        ),
    ],
)
def test_refused(document: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        read(document)


def told(bundle: Bundle, revocation: Revocation | None = None) -> dict[str, str]:
    flags = settings(bundle, revocation, Places("/kept", "/token", "/ca.crt"))
    assert all(flag.startswith("--set=") for flag in flags)
    return dict(flag.removeprefix("--set=").split("=", 1) for flag in flags)


def test_each_bundle_is_signed_and_kept() -> None:
    found = told(Bundle(**SAID, scope="p", polling=9), Revocation("r.tar.gz", "r", 3))
    for root, scope, seconds in (("mcp", "p", "9"), ("mcp_revoked", "r", "3")):
        assert found[f"bundles.{root}.signing.keyid"] == "policy"
        assert found[f"bundles.{root}.signing.scope"] == scope
        assert found[f"bundles.{root}.persist"] == "true"
        assert found[f"bundles.{root}.polling.max_delay_seconds"] == seconds
    assert (found["keys.policy.key"], found["persistence_directory"]) == (PUBLIC_KEY, "/kept")
    assert "mcp_revoked" not in str(told(Bundle(**SAID)))


@pytest.mark.parametrize(
    ("more", "name", "value", "volume"),
    [
        pytest.param({"token": True}, "credentials.bearer.token_path", "/token", "token", id="t"),
        pytest.param({"ca": "ours"}, "tls.ca_cert", "/ca.crt", "ca", id="ca"),
    ],
)
def test_what_the_server_is_shown_and_believed_by_is_opas_alone_and_only_when_asked_for(
    more: Json, name: str, value: str, volume: str
) -> None:
    assert f"services.policy.{name}" not in told(Bundle(**SAID))
    assert told(Bundle(**SAID, **more))[f"services.policy.{name}"] == value
    planned = plan(pod(), ENABLED, Injection(bundle=Bundle(**SAID, **more)))
    volume = f"mcp-opa-sidecar-policy-{volume}"
    mounted = {
        each: [mount["name"] for mount in container(planned, each).get("volumeMounts", ())]
        for each in ("mcp-opa", "mcp-sidecar", "app")
    }
    assert [each for each, names in mounted.items() if volume in names] == ["mcp-opa"]


def test_a_namespace_may_have_a_policy_of_its_own() -> None:
    bundle = Bundle(**{**SAID, "resource": "mcp/{namespace}.tar.gz"}, scope="{namespace}")
    found = told(bundle)
    assert found["bundles.mcp.resource"] == "mcp/$(POD_NAMESPACE).tar.gz"
    assert found["bundles.mcp.signing.scope"] == "$(POD_NAMESPACE)"
    env = container(plan(pod(), ENABLED, Injection(bundle=bundle)), "mcp-opa")["env"]
    [said] = [each["valueFrom"]["fieldRef"] for each in env if each["name"] == "POD_NAMESPACE"]
    assert said["fieldPath"] == "metadata.namespace"


@pytest.mark.parametrize("injection", [BUNDLE, Injection()], ids=["bundle", "ConfigMap"])
def test_where_the_policy_comes_from(injection: Injection) -> None:
    planned = plan(pod(), ENABLED, injection)
    opa, sidecar = container(planned, "mcp-opa"), container(planned, "mcp-sidecar")
    fetched = injection.bundle is not None
    assert ("--watch" not in opa["args"]) is fetched
    assert ("--bundle" in opa["args"]) is fetched
    assert opa["startupProbe"]["httpGet"]["path"] == ("/health?bundles" if fetched else "/health")
    stamps = [each for each in sidecar["env"] if each["name"] == "MCP_SIDECAR_POLICY__STAMP"]
    mounts = [each["mountPath"] for each in sidecar["volumeMounts"]]
    assert (stamps == []) is ("/policy" not in mounts) is fetched
