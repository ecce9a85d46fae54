"""What a policy is told of what a server lists, and that nobody is judged by another's list."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sidecar.protocol.pins import pin
from sidecar.protocol.pins import write as write_pins
from tests.support.offering_server import SCHEMA, Offers
from tests.support.opa import write
from tests.support.processes import LISTENING, Process, http_sidecar, patient, wait_until
from tests.support.raw import (
    Object,
    call,
    initialize,
    modern,
    post,
    request,
    stdio_sidecar,
)

# Every action is denied, in the words of what the policy was told.
RULE = """package mcp.custom

deny contains {"code": "told", "message": json.marshal(input[input.target.type])} if {
	input.target.type in {"tool", "resource", "prompt"}
}

allow contains {"rule": "lists", "any": true} if input.target.type in {"listing", "stream"}
"""
OFFERS: dict[str, Object] = {
    "ana": {"tools": {"common": "Hers.", "hers": "Only hers."}, "resources": ["a://hers"]},
    "bob": {"tools": {"common": "His.", "his": "Only his."}, "resources": ["a://his"]},
    "nobody": {"tools": {"common": "Anybody's."}, "prompts": ["ask"]},
}

Ask = Callable[[Object], Object]


NUMBERS = count(100)


def told(answer: Object) -> Object:
    """What the policy was told of the target."""
    reasons = {each["code"]: each.get("message") for each in answer["error"]["data"]["reasons"]}
    said: Object = json.loads(reasons["told"])
    return said


def read(uri: str) -> Object:
    return request(next(NUMBERS), "resources/read", {"uri": uri})


def get(name: str) -> Object:
    return request(next(NUMBERS), "prompts/get", {"name": name})


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write(tmp_path / "policy", {"custom.rego": RULE})


@pytest.fixture
def offers(tmp_path: Path) -> Offers:
    offers = Offers(tmp_path)
    offers.set(**OFFERS)
    return offers


# ── To each caller what is theirs ─────────────────────────────────────────────────────────────────


def bearer(token: str | None) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {token}")] if token else []


def stateless(url: str, token: str | None) -> Callable[[Object], Object]:
    def ask(message: Object) -> Object:
        headers = [("MCP-Protocol-Version", "2026-07-28"), ("Mcp-Method", message["method"])]
        params = message["params"]
        if name := params.get("name") or params.get("uri"):
            headers.append(("Mcp-Name", name))
        return post(url, modern(message), [*headers, *bearer(token)]).message

    return ask


def session(url: str, token: str | None) -> Callable[[Object], Object]:
    opened = post(url, initialize(), bearer(token))
    headers = [*bearer(token), ("Mcp-Session-Id", opened.headers["mcp-session-id"])]
    ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    post(url, ready, headers)
    return lambda message: post(url, message, headers).message


@pytest.fixture(params=[stateless, session], ids=["stateless", "sessions"])
def caller(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def guard(offers: Offers, policy: Path, opa_bin: Path) -> Iterator[Callable[..., str]]:
    """A sidecar in front of the server that offers by token."""
    with ExitStack() as stack:

        def start(**settings: Any) -> str:
            command = offers.command("--transport", "http")
            upstream = stack.enter_context(Process(command)).wait_for(LISTENING)[1]
            file = policy.with_name("sidecar.json")
            file.write_text(json.dumps(settings), encoding="utf-8")
            options = ("--policy", policy, "--actor", "human:ana", "--config", file)
            served = http_sidecar(upstream, *options, env=patient(opa_bin))
            return stack.enter_context(served).url

        yield start


def test_each_caller_is_judged_by_the_tools_that_are_shown_to_them(
    guard: Callable[..., str], offers: Offers, caller: Any
) -> None:
    url = guard()
    ana, bob, nobody = caller(url, "ana"), caller(url, "bob"), caller(url, None)
    digests: dict[str, str] = {}
    for _ in range(2):
        for who, ask, own in (("ana", ana, "hers"), ("bob", bob, "his"), ("-", nobody, None)):
            common = told(ask(call(1, "common")))
            digests.setdefault(who, common["digest"])
            assert (common["known"], common["digest"]) == (True, digests[who])
            for name in ("hers", "his"):
                assert told(ask(call(2, name)))["known"] is (name == own), (who, name)
    assert len(set(digests.values())) == 3
    # The sidecar has asked for each of them, with what is theirs.
    assert sorted(offers.asked("tools/list")) == ["-", "ana", "bob"]
    assert [told(ask(read("a://hers")))["known"] for ask in (ana, bob, nobody)] == [
        True,
        False,
        False,
    ]


def test_what_one_is_shown_changes_nothing_for_another(
    guard: Callable[..., str], offers: Offers, caller: Any
) -> None:
    url = guard()
    ana, bob = caller(url, "ana"), caller(url, "bob")
    before = told(bob(call(1, "common")))
    offers.set(**{**OFFERS, "ana": {"tools": {"common": "Changed.", "his": "A trap."}}})
    assert "result" in ana(request(2, "tools/list", {}))
    assert told(ana(call(3, "his")))["known"] is True
    assert told(bob(call(4, "common"))) == before


def test_pins_are_held_against_what_each_is_shown(
    guard: Callable[..., str], policy: Path, caller: Any
) -> None:
    approved = [{"name": "common", "description": "Hers.", "inputSchema": SCHEMA}]
    pins = policy.with_name("pins.json")
    pins.write_text(write_pins(pin("offering", approved)), encoding="utf-8")
    url = guard(catalog={"pins": str(pins)})
    ana, bob = caller(url, "ana"), caller(url, "bob")
    assert [told(ask(call(1, "common")))["pinned"] for ask in (ana, bob)] == [True, False]
    approved[0]["description"] = "His."
    pins.write_text(write_pins(pin("offering", approved)), encoding="utf-8")
    wait_until(lambda: told(bob(call(2, "common")))["pinned"], "the new pins are in force")
    assert told(ana(call(3, "common")))["pinned"] is False


def test_one_list_does_for_all_where_no_credentials_go_on(
    guard: Callable[..., str], offers: Offers, caller: Any
) -> None:
    url = guard(http={"forward_authorization": False})
    for token in ("ana", "bob", None):
        assert told(caller(url, token)(call(1, "common")))["known"] is True
    assert offers.asked("tools/list") == ["-"]


# ── Of every kind ─────────────────────────────────────────────────────────────────────────────────

ALL = {
    "tools": {"echo": "Says it."},
    "resources": ["a://one", "file:///etc/motd"],
    "templates": ["b://{x}", "c://{x}/d{?q}"],
    "prompts": ["ask"],
}
KNOWN = [
    ("a://one", True),
    ("file:///etc/motd", True),
    ("file:///etc/shadow", False),
    ("b://anything", True),
    ("b://any/thing", False),
    ("c://1/d", True),
    ("c://1/d?q=2", True),
    ("c://1/e", False),
]


@pytest.fixture(params=["session", "stateless"])
def over_a_pipe(
    request: pytest.FixtureRequest, offers: Offers, policy: Path, opa_bin: Path
) -> Iterator[Callable[..., Ask]]:
    """A client of a sidecar before the server with some arguments, in either era."""
    offers.set(nobody=ALL)
    with ExitStack() as stack:

        def start(*arguments: str) -> Ask:
            options, command = (
                ("--policy", policy, "--actor", "human:ana"),
                offers.command(*arguments),
            )
            pipe = stack.enter_context(stdio_sidecar(command, *options, env=patient(opa_bin)))
            if request.param == "stateless":
                return lambda message: pipe.ask(modern(message))
            pipe.greet()
            return pipe.ask

        yield start


def known(ask: Ask, message: Object) -> bool | None:
    return told(ask(message)).get("known")


def test_a_policy_knows_what_there_is_without_anybody_listing(
    over_a_pipe: Callable[..., Ask], offers: Offers
) -> None:
    ask = over_a_pipe()
    for _ in range(2):
        assert [known(ask, get(name)) for name in ("ask", "beg")] == [True, False]
        assert [(uri, known(ask, read(uri))) for uri, _ in KNOWN] == KNOWN
        assert known(ask, call(next(NUMBERS), "echo")) is True
    for method in ("tools/list", "prompts/list", "resources/list", "resources/templates/list"):
        assert len(offers.asked(method)) == 1, method


def test_of_what_a_server_has_no_methods_for_nothing_is_known(
    over_a_pipe: Callable[..., Ask],
) -> None:
    ask = over_a_pipe("--without", "resources", "templates", "prompts")
    for message in (read("a://one"), get("ask")) * 2:
        assert known(ask, message) is None
    assert known(ask, call(next(NUMBERS), "echo")) is True


def test_a_server_without_templates_tells_all_by_its_resources(
    over_a_pipe: Callable[..., Ask],
) -> None:
    ask = over_a_pipe("--without", "templates")
    assert [known(ask, read(uri)) for uri in ("a://one", "b://anything")] == [True, False]
