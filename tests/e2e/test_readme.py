"""Every command of README.md does what it says, with its addresses and folders put in place."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sidecar.opa import DecisionClient
from tests.support import client as clients
from tests.support import opa
from tests.support.client import MODERN
from tests.support.otlp import Sink
from tests.support.processes import (
    LISTENING,
    ROOT,
    Process,
    desk,
    environment,
    get,
    sidecar,
    ticket_desk,
    wait_until,
)
from tests.support.raw import Pipe, post_modern, request
from tests.support.traced import OPA, SIDECAR, scene

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
UPSTREAM = "http://127.0.0.1:8080/mcp"


def block(kind: str, about: str) -> str:
    """The block of that kind that speaks of `about`."""
    (found,) = [text for language, text in BLOCKS if language == kind and about in text]
    return str(found)


def commands() -> list[str]:
    """The shell commands in blocks that name no language, joined where a line goes on."""
    text = "".join(text for language, text in BLOCKS if not language).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    known = ("make ", "mcp-sidecar ", "cp ")
    return [" ".join(line.split()) for line in lines if line.startswith(known)]


class Newcomer:
    """Somebody who follows the README in a folder of their own, with a server that runs."""

    def __init__(self, folder: Path, opa: Path, upstream: str) -> None:
        self.folder, self.env, self.upstream = folder, environment(opa), upstream
        (folder / "policies").symlink_to(ROOT / "policies")
        self.run(shlex.split(COPY))
        (folder / "sidecar.yaml").write_text(
            block("yaml", "sidecar.yaml").replace(UPSTREAM, upstream).replace(":15801", ":0")
        )

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    def sidecar(self, command: str) -> list[str]:
        """The command as it stands, on ports and in folders that are ours."""
        placed = command.replace(UPSTREAM, self.upstream).replace(":15801", ":0")
        placed = placed.replace("./policy", str(self.folder / "policy"))
        placed = placed.replace("sidecar.yaml", str(self.folder / "sidecar.yaml"))
        return sidecar(*shlex.split(placed)[1:])

    def config(self) -> None:
        """The file names its policy by a path relative to where the command is run."""
        file = self.folder / "sidecar.yaml"
        file.write_text(file.read_text().replace("./policy", str(self.folder / "policy")))


COPY = "cp -r policies/starter ./policy"


@pytest.fixture
def newcomer(tmp_path: Path, opa_bin: Path) -> Newcomer:
    return Newcomer(tmp_path, opa_bin, UPSTREAM)


def make_target(newcomer: Newcomer, command: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "OTLP=" in command:
        assert "--otlp 'http://localhost:4318'" in done.stdout


def copies(newcomer: Newcomer, command: str) -> None:
    assert (newcomer.folder / "policy" / "data.yaml").exists()


def listens(newcomer: Newcomer, command: str) -> None:
    with ticket_desk(newcomer.folder / "log") as server:
        newcomer.upstream = server.url
        newcomer.config()
        words = newcomer.sidecar(command)
        words[4:4] = ["--admin", "127.0.0.1:0"]  # behind the name of the command
        with Process(words, env=newcomer.env) as process:
            url = process.wait_for(LISTENING)[1]
            assert get(url.rpartition("/")[0] + "/nothing-here")[0] == 404


def bridges(newcomer: Newcomer, command: str) -> None:
    with ticket_desk(newcomer.folder / "log") as server:
        newcomer.upstream = server.url
        with Process(newcomer.sidecar(command), env=newcomer.env, pipes=True) as process:
            pipe = Pipe(process)
            assert pipe.greet()["result"]["serverInfo"]["name"] == "ticket-desk"
            pipe.end()
            assert pipe.wait_for_end() == 0


def checks(newcomer: Newcomer, command: str) -> None:
    done = newcomer.run(newcomer.sidecar(command))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["opa"]["policy"].endswith("/policy")


def pins(newcomer: Newcomer, command: str) -> None:
    """The check comes after the writing, as one reads."""
    with ticket_desk(newcomer.folder / "log") as server:
        newcomer.upstream = server.url
        file = newcomer.folder / "pins.json"
        said = newcomer.run(newcomer.sidecar(PIN.partition(" >")[0]))
        assert said.returncode == 0, said.stderr
        file.write_text(said.stdout, encoding="utf-8")
        words = newcomer.sidecar(command.partition(" >")[0].replace("pins.json", str(file)))
        assert newcomer.run(words).returncode == 0


def watches(newcomer: Newcomer, command: str) -> None:
    with ticket_desk(newcomer.folder / "log") as server:
        newcomer.upstream = server.url
        newcomer.config()
        newcomer.env["MCP_SIDECAR_CONTROL"] = str(newcomer.folder / "run" / "control.sock")
        serve = ("http", "--config", newcomer.folder / "sidecar.yaml", "--admin", "127.0.0.1:0")
        with Process(sidecar(*serve), env=newcomer.env) as process:
            url = process.wait_for(LISTENING)[1]
            post_modern(url, request(1, "tickets/nonsense"))
            with Process(newcomer.sidecar(command), env=newcomer.env, pipes=True) as watcher:
                assert b"tickets/nonsense" in watcher.stdout.readline()


def shims(newcomer: Newcomer, command: str) -> None:
    path, me = newcomer.folder / "tickets.sock", str(os.getuid())
    placed = command.replace("/run/mcp-stdio/tickets.sock", str(path)).replace("20001", me)
    words = newcomer.sidecar(placed)[: -len(["python", "ticket_server.py"])]
    with Process([*words, "cat"], env=newcomer.env) as process:
        wait_until(lambda: path.is_socket() or process.ended, "it listens")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"hello\n")
            assert client.recv(6) == b"hello\n"


def builds(newcomer: Newcomer, command: str) -> None:
    file = newcomer.folder / "policy.yaml"
    done = newcomer.run(newcomer.sidecar(command.replace("policy.yaml", str(file))))
    assert done.returncode == 0, done.stderr
    assert "kind: ConfigMap" in file.read_text()


def injects(newcomer: Newcomer, command: str) -> None:
    deployment = ROOT / "k8s" / "examples" / "front" / "before.yaml"
    command = command.partition(" >")[0].replace("deployment.yaml", str(deployment))
    done = newcomer.run(newcomer.sidecar(command))
    assert done.returncode == 0, done.stderr
    expected = "injected: mode front" if "check-inject" in command else "name: mcp-sidecar"
    assert expected in done.stdout


PIN = "mcp-sidecar pin --upstream http://127.0.0.1:8080/mcp > pins.json"
RUN: dict[str, Callable[[Newcomer, str], None]] = {
    "make demo": make_target,  # run by test_demo.py
    "make test": make_target,  # what runs this
    "make jaeger": make_target,
    "make demo JAEGER=1": make_target,  # what it does is in test_jaeger.py
    "make demo OTLP=http://localhost:4318": make_target,
    COPY: copies,
    "mcp-sidecar check --policy ./policy": checks,
    "mcp-sidecar http --policy ./policy --actor service:reporting --listen 127.0.0.1:15801 "
    "--upstream http://127.0.0.1:8080/mcp": listens,
    "mcp-sidecar http --policy ./policy --actor service:reporting --listen 127.0.0.1:15801 "
    "-- python ticket_server.py": listens,
    "mcp-sidecar shim --socket /run/mcp-stdio/tickets.sock --peer 20001 "
    "-- python ticket_server.py": shims,
    "mcp-sidecar http --policy ./policy --actor service:reporting --listen 127.0.0.1:15801 "
    "--upstream unix-stdio:///run/mcp-stdio/tickets.sock": listens,
    "mcp-sidecar stdio --policy ./policy --actor agent:support-bot "
    "--upstream http://127.0.0.1:8080/mcp": bridges,
    "mcp-sidecar http --config sidecar.yaml --otlp http://localhost:4318": listens,
    PIN: pins,
    "mcp-sidecar policy build ./policy -o policy.yaml --namespace support": builds,
    "mcp-sidecar inject -f deployment.yaml "
    "--image registry.example.com/mcp-opa-sidecar:0.1.0 > injected.yaml": injects,
    "mcp-sidecar check-inject -f deployment.yaml --enabled": injects,
    "mcp-sidecar tail --decision deny": watches,
    "mcp-sidecar pin --check pins.json --upstream http://127.0.0.1:8080/mcp": pins,
}


def test_every_command_of_the_readme_is_run_here() -> None:
    assert set(commands()) == set(RUN)


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_readme_works(newcomer: Newcomer, command: str) -> None:
    RUN[command](newcomer, command)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", README))))
def test_make_targets_that_the_readme_speaks_of_exist(target: str) -> None:
    make_target_of = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert make_target_of.returncode == 0


async def test_the_client_configuration_wraps_a_server(newcomer: Newcomer) -> None:
    configured = json.loads(block("json", "mcpServers"))["mcpServers"]["tickets"]
    assert configured["command"] == "/path/to/mcp-sidecar"
    cut = configured["args"].index("--")
    before = [
        str(newcomer.folder / "policy") if word == "/path/to/policy" else word
        for word in configured["args"][:cut]
    ]
    server = desk(newcomer.folder / "log", "--transport", "stdio")
    command = [sys.executable, "-m", "sidecar", *before, "--", *server]
    async with clients.over_stdio(command, MODERN, env=newcomer.env) as client:
        assert "search_tickets" in await clients.tools_of(client)


def test_the_policy_shown_is_one_that_passes_the_check(newcomer: Newcomer) -> None:
    shown = block("yaml", "support-bot:\n          refunds")
    assert yaml.safe_load(shown)["mcp"]["grants"]["agents"]
    (newcomer.folder / "policy" / "data.yaml").write_text(shown, encoding="utf-8")
    checks(newcomer, "mcp-sidecar check --policy ./policy")


async def test_a_co_located_opa_joins_the_trace_by_the_configuration_shown(
    tmp_path: Path, opa_bin: Path
) -> None:
    """It exports what the sidecar has chosen, and of its own accord nothing."""
    shown = yaml.safe_load(block("yaml", "distributed_tracing"))
    policy, config = opa.write(tmp_path / "opa", {"p.rego": opa.ALLOW_ALL}), tmp_path / "opa.json"
    with Sink() as sink, scene(sink.url, tmp_path, ("stdio", MODERN), opa_bin) as played:
        shown["distributed_tracing"]["address"] = sink.url.removeprefix("http://")
        shown["distributed_tracing"]["batch_span_processor_options"] = {"batch_timeout_ms": 100}
        config.write_text(json.dumps(shown), encoding="utf-8")
        async with (
            opa.real_opa(opa_bin, policy, "--config-file", str(config)) as real,
            replace(played, decider=("--opa", real.url)).open() as client,
        ):
            stranger = DecisionClient(real.url)
            await stranger.decide({}, deadline=5, headers={})
            await stranger.close()
            await client.list_tools()
            caller, _ = await played.call(client, "get_ticket", id=4711)
            sink.wait_for(7, where=lambda span: span.trace_id == caller.trace_id)
    spans = {span.span_id: span for span in sink.spans}
    theirs = [span for span in spans.values() if span.service == OPA]
    assert caller.trace_id in {span.trace_id for span in theirs}
    for span in theirs:
        asked = spans[span.parent_id or "no parent"]
        assert (asked.service, asked.name) == (SIDECAR, "policy.evaluate mcp/authz")


def test_files_that_the_readme_links_to_exist() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
