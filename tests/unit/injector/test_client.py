"""Mode `client`: an agent is told that its servers are where its sidecar is."""

from __future__ import annotations

from sidecar.injector.changes import restore
from sidecar.injector.injection import Injection, Json
from sidecar.injector.plan import plan
from tests.support.pods import ENABLED, annotated, container, pod

ENV = [
    {"name": "TICKETS_URL", "value": "http://tickets.support:8080/mcp"},
    {"name": "SEARCH_URL", "value": "https://search.example.com"},
    {"name": "OTHER_URL", "value": "http://other/mcp"},
]
TOLD = {
    "TICKETS_URL": "http://127.0.0.1:15801/tickets/mcp",
    "SEARCH_URL": "http://127.0.0.1:15801/search",
    "OTHER_URL": "http://other/mcp",
}


def agent(**annotations: str) -> Json:
    found = pod({"env": ENV, "ports": []})
    return annotated(
        found, mode="client", servers="tickets=TICKETS_URL, search=SEARCH_URL", **annotations
    )


def arguments(injection: Injection) -> list[str]:
    said: list[str] = container(plan(agent(), ENABLED, injection), "mcp-sidecar")["args"]
    return said


def test_the_agent_dials_the_sidecar_and_the_sidecar_the_servers() -> None:
    planned = plan(agent(), ENABLED, Injection())
    assert {each["name"]: each["value"] for each in container(planned, "app")["env"]} == TOLD
    assert arguments(Injection())[1:4] == [
        "--listen=127.0.0.1:15801",
        "--upstream=tickets=http://tickets.support:8080/mcp",
        "--upstream=search=https://search.example.com",
    ]


def test_who_calls_is_the_account_as_an_agent_unless_the_operator_says_how_to_tell() -> None:
    actor = "--actor=agent:system:serviceaccount:$(POD_NAMESPACE):$(POD_SERVICE_ACCOUNT)"
    assert actor in arguments(Injection())
    assert not any(each.startswith("--actor") for each in arguments(Injection(config="c")))


def test_probes_stay_and_others_may_be_there() -> None:
    probe = {"httpGet": {"path": "/", "port": 15801 - 1}}
    found = agent(container="app")
    found["spec"]["containers"][0]["livenessProbe"] = probe
    found["spec"]["containers"].append({"name": "other", "image": "x"})
    planned = plan(found, ENABLED, Injection())
    assert container(planned, "app")["livenessProbe"] == probe
    assert restore(planned) == found
