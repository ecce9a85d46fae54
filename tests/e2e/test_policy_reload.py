"""A policy folder that is edited while calls go on: good edits are in force, bad ones are said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support import permissive_server
from tests.support.opa import write
from tests.support.processes import (
    LISTENING,
    Process,
    Served,
    alive,
    descendants,
    environment,
    get,
    http_sidecar,
    wait_until,
)
from tests.support.raw import Object, call, code, post

IN_FORCE = 10.0

RULE = """package mcp.custom

allow contains {{"rule": "named", "any": true}} if input.target.name in {names}
"""
FROM_DATA = RULE.format(names="data.allowed")
BROKEN = {
    "Rego that does not parse": {"custom.rego": "package mcp.custom\n\nallow contains {\n"},
    "Rego that is not strict": {
        "custom.rego": "package mcp.custom\n\nallow contains {} if { unused := 1 }\n"
    },
    "broken YAML": {"data.yaml": "allowed: [echo\n  - x: ]\n"},
    "data in the place of the library": {"extra.json": '{"mcp": {"authz": {"decision": true}}}'},
}


@dataclass
class Desk:
    """A sidecar with a policy folder that a test edits."""

    policy: Path
    log: Path
    served: Served
    calls: int = 0

    def code(self, name: str = "echo") -> int | None:
        self.calls += 1
        return code(post(self.served.url, call(self.calls, name)).message)

    def readyz(self) -> tuple[int, Object]:
        status, body = get(f"{self.served.admin}/readyz")
        return status, json.loads(body)

    def rejected(self) -> Object | None:
        found: Object | None = self.readyz()[1]["policy"].get("rejected")
        return found

    def says(self, pattern: str) -> bool:
        return any(pattern in line for line in self.served.process.lines)

    def opa(self) -> int | None:
        for pid in descendants(self.served.pid):
            with suppress(psutil.NoSuchProcess):
                # `opa check` of an edit is an OPA as well.
                if psutil.Process(pid).cmdline()[1:2] == ["run"]:
                    return pid
        return None


@pytest.fixture
def desk(opa_bin: Path, tmp_path: Path) -> Iterator[Desk]:
    policy = write(
        tmp_path / "policy", {"custom.rego": FROM_DATA, "data.yaml": "allowed: [echo]\n"}
    )
    log = tmp_path / "log"
    with Process(permissive_server.command(log, "--transport", "http")) as server:
        upstream, env = server.wait_for(LISTENING)[1], environment(opa_bin)
        with http_sidecar(upstream, "--policy", policy, env=env) as served:
            yield Desk(policy, log, served)


def in_force(desk: Desk, name: str, wanted: int | None, what: str) -> None:
    began = time.monotonic()
    wait_until(lambda: desk.code(name) == wanted, what, IN_FORCE)
    print(f"MEASURED {what}: in force after {time.monotonic() - began:.3f} s")


DENIED = -31403


def test_an_edit_is_in_force_for_the_next_calls(desk: Desk) -> None:
    assert (desk.code(), desk.code("other")) == (None, DENIED)
    first = desk.readyz()[1]["policy"]["revision"]

    write(desk.policy, {"data.yaml": "allowed: [other]\n"})
    in_force(desk, "echo", DENIED, "data edited")
    assert desk.code("other") is None
    second = desk.readyz()[1]["policy"]["revision"]

    write(desk.policy, {"custom.rego": RULE.format(names='["third"]')})
    in_force(desk, "third", None, "a rule edited")
    assert desk.code("other") == DENIED

    write(desk.policy, {"more/more.json": '{"allowed_too": ["fourth"]}'})
    write(desk.policy, {"custom.rego": RULE.format(names="data.more.allowed_too")})
    in_force(desk, "fourth", None, "a file added")

    shutil.rmtree(desk.policy / "more")
    in_force(desk, "fourth", DENIED, "a data file removed")

    (desk.policy / "new").write_text("allowed: [echo]\n", encoding="utf-8")
    (desk.policy / "new").replace(desk.policy / "data.yaml")
    (desk.policy / "custom.rego").write_text(FROM_DATA, encoding="utf-8")
    in_force(desk, "echo", None, "a file replaced, as editors do")

    third = desk.readyz()[1]["policy"]["revision"]
    assert second not in (first, third)
    assert third == first  # the same content is the same revision


@pytest.mark.parametrize("gone", ["removed", "renamed"])
def test_a_rule_file_that_is_gone_allows_nothing_any_more(desk: Desk, gone: str) -> None:
    """OPA itself keeps a module whose file was not there when it looked again."""
    write(desk.policy, {"more/rules.rego": RULE.format(names='["fourth"]')})
    in_force(desk, "fourth", None, "a rule file added")
    if gone == "removed":
        shutil.rmtree(desk.policy / "more")
    else:
        (desk.policy / "more" / "rules.rego").rename(desk.policy / "others.rego")
        write(desk.policy, {"others.rego": RULE.format(names='["fifth"]')})
    in_force(desk, "fourth", DENIED, f"a rule file {gone}")
    assert desk.code("echo") is None
    assert desk.code("fifth") == (None if gone == "renamed" else DENIED)


@pytest.mark.parametrize("edit", list(BROKEN))
def test_a_bad_edit_keeps_the_last_good_policy_also_over_a_restart_of_opa(
    desk: Desk, edit: str
) -> None:
    assert (desk.code(), desk.code("other")) == (None, DENIED)
    good = desk.readyz()[1]["policy"]["revision"]
    originals = {name: (desk.policy / name).read_text() for name in ("custom.rego", "data.yaml")}

    write(desk.policy, BROKEN[edit])
    began = time.monotonic()
    wait_until(desk.rejected, "the edit is rejected", IN_FORCE)
    print(f"MEASURED {edit}: rejected after {time.monotonic() - began:.3f} s")
    rejected = desk.rejected()
    assert rejected is not None
    assert rejected["error"]
    assert rejected["at"]
    status, body = desk.readyz()
    assert (status, body["policy"]["revision"]) == (200, good)
    line = desk.served.process.wait_for("policy_rejected")
    assert good in line.string
    assert (desk.code(), desk.code("other")) == (None, DENIED)

    opa = desk.opa()
    assert opa is not None
    os.kill(opa, signal.SIGKILL)
    wait_until(lambda: not alive(opa), "OPA is dead")
    wait_until(lambda: desk.opa() not in (None, opa), "another OPA", IN_FORCE)
    wait_until(lambda: desk.code() is None, "calls work again", IN_FORCE)
    assert desk.code("other") == DENIED
    wait_until(lambda: desk.readyz()[1]["policy"]["revision"] == good, "the good one", IN_FORCE)
    assert desk.readyz()[0] == 200
    assert desk.rejected() == rejected

    for name in set(BROKEN[edit]) - set(originals):
        (desk.policy / name).unlink()
    write(desk.policy, {**originals, "data.yaml": "allowed: [other]\n"})
    in_force(desk, "other", None, "mended")
    wait_until(lambda: desk.rejected() is None, "the rejection is cleared", IN_FORCE)
    assert desk.code() == DENIED
    assert not any("Traceback" in each for each in desk.served.process.lines)


def test_a_folder_that_vanishes_keeps_the_last_good_policy_until_it_is_back(desk: Desk) -> None:
    assert desk.code() is None
    aside = desk.policy.with_name("aside")
    desk.policy.rename(aside)
    wait_until(desk.rejected, "the folder is missed", IN_FORCE)
    assert (desk.code(), desk.code("other")) == (None, DENIED)
    write(aside, {"data.yaml": "allowed: [other]\n"})
    aside.rename(desk.policy)
    in_force(desk, "other", None, "the folder is back")
    wait_until(lambda: desk.rejected() is None, "the rejection is cleared", IN_FORCE)


def test_every_call_during_many_edits_is_judged_by_one_of_the_policies(desk: Desk) -> None:
    """Two names are allowed together or not at all: half an edit would allow one of them."""
    deadline, edits, seen = time.monotonic() + 3, 0, set()
    while time.monotonic() < deadline:
        both = edits % 2
        write(desk.policy, {"data.yaml": f"allowed: {'[a, b]' if both else '[c]'}\n"})
        edits += 1
        wanted = None if both else DENIED
        until = time.monotonic() + IN_FORCE
        while (answer := desk.code("a")) != wanted:
            seen.add(answer)
            assert time.monotonic() < until
        assert desk.code("b") == wanted
        seen.add(answer)
    assert seen == {None, DENIED}
    print(f"MEASURED {edits} edits in 3 s, each in force before the next, no call without decision")
