"""The commands as an operator meets them: help that teaches, and errors that fit on a screen."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import permissive_server
from tests.support.identity import idp
from tests.support.opa import write
from tests.support.processes import (
    ALLOW_ALL,
    ROOT,
    Process,
    alive,
    descendants,
    environment,
    sidecar,
    wait_until,
)

SCREEN = 24
CONFIG_FAULT, POLICY_FAULT = 125, 126
UPSTREAM = ("--upstream", "http://127.0.0.1:1/mcp")
LISTEN = ("--listen", "127.0.0.1:0")
SERVER = ("--", sys.executable, "-c", "pass")


@pytest.fixture
def env(opa_bin: Path) -> dict[str, str]:
    return environment(opa_bin)


def run(env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the sidecar to its end, with nothing on its stdin."""
    return subprocess.run(
        sidecar(*arguments),
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


def fits(done: subprocess.CompletedProcess[str], code: int) -> str:
    """It ended with this code, said why on one screen, on stderr alone, and did not crash."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert 0 < len(done.stderr.splitlines()) <= SCREEN, done.stderr
    return done.stderr


# ── Help ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "words"),
    [
        pytest.param((), ("stdio", "http", "check", "examples:", "125", "126"), id="all"),
        pytest.param(("stdio",), ("-- COMMAND", "--policy", "--opa", "--actor"), id="stdio"),
        pytest.param(("http",), ("--listen", "--upstream", "--admin", "--audit"), id="http"),
        pytest.param(("check",), ("--config", "--policy", "Every problem"), id="check"),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_teaches(
    env: dict[str, str], command: tuple[str, ...], words: tuple[str, ...], flag: str
) -> None:
    done = run(env, *command, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in words if word not in done.stdout] == []
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_version_is_said(env: dict[str, str]) -> None:
    done = run(env, "--version")
    assert done.returncode == 0
    assert re.fullmatch(r"mcp-opa-sidecar \d+\.\d+\.\d+\S*\n", done.stdout)


# ── Usage ─────────────────────────────────────────────────────────────────────────────────────────

POLICY = ("--policy", str(ALLOW_ALL))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param((), ("COMMAND",), id="nothing"),
        pytest.param(("stdoi",), ("no command 'stdoi'", "did you mean 'stdio'"), id="a typo"),
        pytest.param(("fly",), ("no command 'fly'", "stdio, http, check"), id="no command"),
        pytest.param(("stdio", *POLICY, "--polcy", "x", *SERVER), ("--polcy",), id="a flag"),
        pytest.param(("stdio", *POLICY, "python"), ("python",), id="no dashes before COMMAND"),
        pytest.param(("stdio", *POLICY), ("COMMAND",), id="no server"),
        pytest.param(("stdio", *SERVER), ("--policy", "--opa"), id="no policy"),
        pytest.param(("http", *POLICY, *LISTEN), ("--upstream",), id="no upstream"),
        pytest.param(("http", *POLICY, *UPSTREAM), ("--listen",), id="no address"),
        pytest.param(
            ("stdio", *POLICY, "--opa", "http://127.0.0.1:1", *SERVER),
            ("exclude each other",),
            id="two policies",
        ),
        pytest.param(
            ("stdio", *POLICY, "--actor", "robot:x", *SERVER),
            ("--actor", "human", "service", "agent", "robot:x"),
            id="an actor of no type",
        ),
        pytest.param(
            ("http", *POLICY, "--listen", "8080", *UPSTREAM), ("--listen", "HOST:PORT"), id="a port"
        ),
        pytest.param(
            ("stdio", *POLICY, "--config", "/nowhere/config.yaml", *SERVER),
            ("/nowhere/config.yaml", "No such file"),
            id="no configuration",
        ),
        # Known by name, and not built.
        pytest.param(("audit", "verify", "x"), ("'audit'", "not there yet"), id="a later command"),
        pytest.param(("shim",), ("shim needs -- COMMAND, or --install",), id="shim of nothing"),
        pytest.param(
            ("shim", "--install", "/x", "--", "y"),
            ("shim needs -- COMMAND, or",),
            id="shim of both",
        ),
        pytest.param(
            ("shim", "--install", "/proc/x"), ("can not be installed in /proc/x",), id="no folder"
        ),
    ],
)
def test_wrong_usage_ends_with_125_and_says_what_is_wrong(
    env: dict[str, str], arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    text = fits(run(env, *arguments), CONFIG_FAULT)
    assert [word for word in said if word not in text] == [], text


def test_every_problem_of_a_configuration_is_said_at_once(
    env: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """\
polcy: {dir: x}
enforcement: {shadoww: all, denial: maybe}
limits:
  nesting: many
  client_mesage: 5
upstreams:
  - {nam: tickets, url: "ftp://x"}
identity: {source: mtls}
""",
        encoding="utf-8",
    )
    env["MCP_SIDECAR_LIMITS__NESTIN"] = "3"
    done = run(env, "http", "--config", config, "--listen", "nowhere:99999", "--shadow")
    text = fits(done, CONFIG_FAULT)
    for where, hint in (
        ("polcy", "did you mean 'policy'"),
        ("enforcement.shadoww", "enforcement.shadow"),
        ("enforcement.denial", "error, result"),
        ("limits.nesting", "number"),
        ("limits.client_mesage", "limits.client_message"),
        ("upstreams[0].nam", "did you mean 'name'"),
        ("upstreams[0].url", "http"),
        ("identity.source", "static, none"),
        ("MCP_SIDECAR_LIMITS__NESTIN", "MCP_SIDECAR_LIMITS__NESTING"),
        ("--listen", "HOST:PORT"),
    ):
        lines = [line for line in text.splitlines() if f" {where}:" in line]
        assert len(lines) == 1, f"{where} in:\n{text}"
        assert hint in lines[0]


@pytest.mark.parametrize(
    "text",
    ["policy: [", "a: 1\na: 2\n", "- a list\n", "\tx", "policy: {dir: x}\n---\npolicy: {}\n"],
)
def test_a_configuration_that_is_no_mapping_is_a_usage_error(
    env: dict[str, str], tmp_path: Path, text: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    said = fits(run(env, "stdio", "--config", config, *SERVER), CONFIG_FAULT)
    assert "config.yaml" in said


# ── OPA and its policy ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["stdio", "http", "check"])
def test_without_opa_it_ends_with_126_and_says_how_to_get_one(
    env: dict[str, str], tmp_path: Path, command: str
) -> None:
    del env["MCP_SIDECAR_OPA_BIN"]
    env |= {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    rest = {"stdio": SERVER, "http": (*LISTEN, "--admin", "off", *UPSTREAM), "check": ()}[command]
    text = fits(run(env, command, *POLICY, *rest), POLICY_FAULT)
    assert "OPA 1.0 or later is needed" in text
    assert "MCP_SIDECAR_OPA_BIN" in text
    assert "make setup" in text


@pytest.mark.parametrize("command", ["stdio", "check"])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        pytest.param({"a.rego": "package mcp.custom\n\nallow if {\n"}, "a.rego", id="syntax"),
        pytest.param({"a.rego": "package mcp.custom\n\nx := y\n"}, "a.rego", id="unsafe"),
        pytest.param({"data.yaml": "a: ["}, "data.yaml", id="data"),
        pytest.param({"README": "nothing"}, "holds no .rego", id="empty"),
        pytest.param(None, "policy", id="not there"),
    ],
)
def test_a_broken_policy_ends_with_126_and_nothing_is_started(
    env: dict[str, str], tmp_path: Path, command: str, files: dict[str, str] | None, said: str
) -> None:
    policy, witness = tmp_path / "policy", tmp_path / "started"
    if files is not None:
        write(policy, files)
    started = ("--", sys.executable, "-c", f"open({str(witness)!r}, 'w')")
    rest = started if command == "stdio" else ()
    text = fits(run(env, command, "--policy", policy, *rest), POLICY_FAULT)
    assert said in text
    assert not witness.exists()


@pytest.fixture
def room(env: dict[str, str]) -> Iterator[Path]:
    """Where the sidecar keeps its own; the path is short, since a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        env["TMPDIR"] = folder
        yield Path(folder)


def test_a_start_that_fails_leaves_no_folder_behind(
    env: dict[str, str], tmp_path: Path, room: Path
) -> None:
    policy = write(tmp_path / "policy", {"a.rego": "package mcp.custom\n\nallow if {\n"})
    fits(run(env, "stdio", "--policy", policy, *SERVER), POLICY_FAULT)
    assert run(env, "stdio", *POLICY, *SERVER).returncode == 0
    assert run(env, "check", *POLICY).returncode == 0
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("command", ["stdio", "check"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_is_interrupted_leaves_nothing_behind(
    env: dict[str, str], tmp_path: Path, room: Path, command: str, number: signal.Signals
) -> None:
    slow = tmp_path / "slow-opa"
    real = env["MCP_SIDECAR_OPA_BIN"]
    text = f'#!/bin/sh\n[ "$1" = version ] && exec {real} version\nexec sleep 600\n'
    slow.write_text(text, encoding="utf-8")
    slow.chmod(0o755)
    env["MCP_SIDECAR_OPA_BIN"] = str(slow)
    rest = SERVER if command == "stdio" else ()
    with Process(sidecar(command, *POLICY, *rest), env=env) as process:
        wait_until(lambda: len(descendants(process.pid)) == 2, "the policy is being checked")
        children = descendants(process.pid)
        assert list(room.iterdir())
        process.signal(number)
        assert process.wait() == 128 + number
        assert process.lines == []
    assert list(room.iterdir()) == []
    assert [pid for pid in children if alive(pid)] == []


# ── What is wrapped ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["/nowhere/server", "no-such-command", str(ROOT)])
def test_a_command_that_can_not_be_started_is_a_usage_error(
    env: dict[str, str], command: str
) -> None:
    done = run(env, "stdio", *POLICY, "--", command)
    assert done.returncode == CONFIG_FAULT
    assert f"COMMAND {command!r} can not be started" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", [0, 1, 42, 125, 126])
def test_the_exit_code_of_the_wrapped_command_is_passed_on(
    env: dict[str, str], tmp_path: Path, code: int
) -> None:
    server = permissive_server.command(tmp_path / "log", "--exit", str(code))
    done = run(env, "stdio", *POLICY, "--", *server)
    assert (done.returncode, done.stdout) == (code, "")


@pytest.mark.parametrize("flag", ["--listen", "--admin"])
def test_an_address_that_is_taken_is_a_usage_error(env: dict[str, str], flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        where = {"--listen": "127.0.0.1:0", "--admin": "off", flag: address}
        flags = [word for pair in where.items() for word in pair]
        done = run(env, "http", *POLICY, *flags, *UPSTREAM)
    assert done.returncode == CONFIG_FAULT
    assert f"{flag.removeprefix('--')}: can not listen on {address}" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_audit_file_that_can_not_be_written_is_a_usage_error(env: dict[str, str]) -> None:
    done = run(env, "stdio", *POLICY, "--audit", "/nowhere/audit.jsonl", *SERVER)
    assert done.returncode == CONFIG_FAULT
    assert "/nowhere/audit.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


# ── check ─────────────────────────────────────────────────────────────────────────────────────────


def test_check_shows_what_would_be_in_force(env: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("limits: {nesting: 32}\nenforcement: {disclose: codes}\n", encoding="utf-8")
    done = run(env, "check", "--config", config, *POLICY, "--actor", "human:ana")
    assert done.returncode == 0
    settings = json.loads(done.stdout)
    assert settings["limits"]["nesting"] == 32
    assert settings["enforcement"]["disclose"] == "codes"
    assert "ana" in json.dumps(settings["identity"])
    assert re.search(r"fine: OPA decides, policy revision [0-9a-f]{12}", done.stderr)


def test_check_tells_of_configuration_and_policy_at_once(
    env: dict[str, str], tmp_path: Path
) -> None:
    config, policy = tmp_path / "config.yaml", tmp_path / "policy"
    config.write_text("limts: {nesting: 32}\n", encoding="utf-8")
    policy.mkdir()
    (policy / "custom.rego").write_text("package mcp.custom\nallow contains if\n", encoding="utf-8")
    told = fits(run(env, "check", "--config", config, "--policy", policy), CONFIG_FAULT)
    assert "did you mean 'limits'" in told
    assert "custom.rego:2" in told


def test_check_fetches_keys_only_when_it_is_told_to(env: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    with idp() as issuer, idp() as gone:
        issuers = [issuer.believed(), gone.believed()]
        config.write_text(json.dumps({"identity": {"jwt": issuers}}), encoding="utf-8")
        gone.stop()
        assert run(env, "check", "--config", config, *POLICY).returncode == 0
        assert issuer.server.asked == []
        told = fits(run(env, "check", "--online", "--config", config, *POLICY), CONFIG_FAULT)
        assert f"the keys of {gone.url} can not be had: the issuer is not reached" in told
        assert f"the keys of {issuer.url}" not in told
        config.write_text(json.dumps({"identity": {"jwt": issuers[:1]}}), encoding="utf-8")
        done = run(env, "check", "--online", "--config", config, *POLICY)
        assert (done.returncode, f"fine: the keys of {issuer.url}" in done.stderr) == (0, True)


def test_check_of_an_opa_that_does_not_answer_says_so(env: dict[str, str], tmp_path: Path) -> None:
    done = run(env, "check", "--opa", f"unix://{tmp_path / 'opa.sock'}")
    assert "connection_error" in fits(done, POLICY_FAULT)
