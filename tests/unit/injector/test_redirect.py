"""Mode `redirect`: who dials the server gets the sidecar, and nobody can be or become its user."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import Injection, Json
from sidecar.injector.plan import plan
from sidecar.injector.verify import verify_changed
from tests.support.pods import ENABLED, annotated, container, pod

HELD: Json = {"allowPrivilegeEscalation": False, "runAsUser": 0}
DROPPED: Json = {**HELD, "capabilities": {"drop": ["ALL"]}}
SOMEBODY: Json = {**HELD, "runAsUser": 1000}


def redirected(context: Json | None, **spec: Any) -> Json:
    """A pod whose server has this security context."""
    return annotated(
        pod({} if context is None else {"securityContext": context}, **spec), mode="redirect"
    )


def test_the_server_is_told_nothing_and_the_sidecar_is_elsewhere() -> None:
    found = redirected(DROPPED)
    planned = plan(found, ENABLED, Injection())
    assert container(planned, "app") == container(found, "app")
    arguments = container(planned, "mcp-sidecar")["args"]
    assert "--listen=[127.0.0.1,$(POD_IPS)]:15801" in arguments
    assert "--upstream=http://127.0.0.1:8080/mcp" in arguments


@pytest.mark.parametrize("native", [True, False])
def test_rules_are_made_before_anybody_else_begins(native: bool) -> None:
    found = redirected(
        DROPPED, initContainers=[{"name": "first", "image": "x", "securityContext": DROPPED}]
    )
    planned = plan(found, ENABLED, Injection(native=native, sidecar_id=700))
    rules = planned["spec"]["initContainers"][0]
    assert rules["args"][:4] == ["redirect", "--port=8080", "--to=15801", "--except-uid=700"]
    assert rules["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert "restartPolicy" not in rules


def test_a_port_below_1024_can_be_guarded_since_nobody_else_binds_it() -> None:
    found = redirected(DROPPED)
    found["spec"]["containers"][0]["ports"][0]["containerPort"] = 80
    assert "--port=80" in plan(found, ENABLED, Injection())["spec"]["initContainers"][0]["args"]


def test_probes_of_the_server_are_moved() -> None:
    found = redirected(DROPPED)
    found["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/", "port": 8080}}
    moved = container(plan(found, ENABLED, Injection()), "app")["readinessProbe"]["httpGet"]
    assert moved == {"path": "/app-health/app/readyz", "port": 15820}


ESCALATES = "does not say allowPrivilegeEscalation: false"

REFUSED: dict[str, tuple[Json | None, str]] = {
    "nothing said": (None, ESCALATES),
    "no user": ({"allowPrivilegeEscalation": False, "runAsNonRoot": True}, "not say runAsUser"),
    "the sidecar's user": ({**DROPPED, "runAsUser": 20001}, "reserved"),
    "nothing dropped": (HELD, "has NET_RAW, SETUID"),
    "escalation": ({**DROPPED, "allowPrivilegeEscalation": True}, ESCALATES),
    "escalation of somebody": ({"runAsNonRoot": True, "runAsUser": 1000}, ESCALATES),
    "one dropped": ({**HELD, "capabilities": {"drop": ["SETUID"]}}, "has NET_RAW"),
    **{
        f"{name} added": (
            {**SOMEBODY, "capabilities": {"drop": ["ALL"], "add": [name]}},
            f"has {name.removeprefix('CAP_')}",
        )
        for name in (
            "BPF", "NET_ADMIN", "NET_RAW", "SETUID", "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE",
            "SYS_RAWIO", "CAP_NET_ADMIN",
        )
    },
    "small letters": ({**DROPPED, "capabilities": {"drop": ["ALL"], "add": ["setuid"]}}, "SETUID"),
    "all added": ({**HELD, "capabilities": {"drop": ["ALL"], "add": ["ALL"]}}, "has BPF, NET"),
}  # fmt: skip

ACCEPTED: dict[str, Json] = {
    "all dropped, but root": DROPPED,
    "somebody": SOMEBODY,
    "what counts is dropped": {**HELD, "capabilities": {"drop": ["net_raw", "CAP_SETUID"]}},
    "what does not count is added": {
        **HELD,
        "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
    },
}


@pytest.mark.parametrize(("context", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(context: Json | None, reason: str) -> None:
    with pytest.raises(InjectionRefused, match=reason):
        plan(redirected(context), ENABLED, Injection())


@pytest.mark.parametrize("context", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(context: Json) -> None:
    assert plan(redirected(context), ENABLED, Injection()) != redirected(context)


def test_the_pod_may_say_for_all_who_they_are() -> None:
    escalates: Json = {"allowPrivilegeEscalation": False}
    found = redirected(escalates, securityContext={"runAsUser": 1000})
    assert plan(found, ENABLED, Injection()) != found
    with pytest.raises(InjectionRefused, match="has NET_RAW, SETUID"):
        plan(redirected(escalates, securityContext={"runAsUser": 0}), ENABLED, Injection())


@pytest.mark.parametrize("kind", ["initContainers", "containers"])
def test_nobody_in_the_pod_may_get_around(kind: str) -> None:
    found = redirected(DROPPED)
    found["spec"].setdefault(kind, []).append({"name": "other", "image": "x"})
    with pytest.raises(InjectionRefused, match="container other does not say runAsUser"):
        plan(found, ENABLED, Injection())
    found["spec"][kind][-1]["securityContext"] = DROPPED
    assert plan(found, ENABLED, Injection()) != found


def test_nor_somebody_who_comes_later() -> None:
    old = plan(redirected(DROPPED), ENABLED, Injection())
    debugged = deepcopy(old)
    debugged["spec"]["ephemeralContainers"] = [{"name": "debugger", "image": "x"}]
    with pytest.raises(InjectionRefused, match="container debugger"):
        verify_changed(debugged, old, Injection())
    debugged["spec"]["ephemeralContainers"][0]["securityContext"] = DROPPED
    verify_changed(debugged, old, Injection())
