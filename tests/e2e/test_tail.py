"""`mcp-sidecar tail`: a real sidecar, watched by the real command over the control socket."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.otlp import Sink
from tests.support.processes import (
    STARTER,
    Process,
    desk,
    http_sidecar,
    patient,
    sidecar,
    ticket_desk,
    wait_until,
)
from tests.support.raw import Pipe, call, initialize, post, request

BOT = ("--policy", STARTER, "--actor", "agent:support-bot")
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r"
SECRETS = ("hunter2-argument", "hunter2-result", "hunter2-bearer")


class Desk:
    """A ticket desk behind a sidecar on a pipe, and those who watch it."""

    def __init__(self, folder: Path, opa: Path, stack: ExitStack) -> None:
        self.folder, self.env, self._stack = folder, patient(opa), stack
        self.socket = folder / "private" / "control.sock"
        self.server = desk(folder / "log")

    def guard(self, *options: str | Path, who: tuple[str | Path, ...] = BOT) -> Pipe:
        """A client of the sidecar, which has shaken hands."""
        pipe = Pipe(self.start(*options, who=who))
        pipe.greet()
        return pipe

    def start(self, *options: str | Path, who: tuple[str | Path, ...] = BOT) -> Process:
        command = sidecar("stdio", *who, "--control", self.socket, *options, "--", *self.server)
        return self._stack.enter_context(Process(command, env=self.env, pipes=True))

    def watch(self, *options: str) -> Pipe:
        """Somebody who watches; what it prints are the lines of a pipe."""
        command = sidecar("tail", "--control", self.socket, *options)
        return Pipe(self._stack.enter_context(Process(command, env=self.env, pipes=True)))

    def fails(self, *options: str | Path) -> str:
        """A sidecar that does not start because of its control socket."""
        with Process(sidecar("stdio", *BOT, *options, "--", *self.server), env=self.env) as process:
            assert process.wait() == 125
            return process.tail()


@pytest.fixture
def tickets(tmp_path: Path, opa_bin: Path) -> Iterator[Desk]:
    with ExitStack() as stack:
        yield Desk(tmp_path, opa_bin, stack)


def text(watcher: Pipe) -> str:
    return b"".join(watcher.lines).decode()


def shown(watcher: Pipe, pattern: str) -> re.Match[str]:
    """The first match in what is shown, once it is."""
    found = wait_until(lambda: re.search(pattern, text(watcher)), f"{pattern!r} is shown")
    assert found is not None
    return found


# ── What is shown ─────────────────────────────────────────────────────────────────────────────────


def test_an_action_is_a_line(tickets: Desk) -> None:
    client, watcher = tickets.guard(), tickets.watch()
    client.ask(call(1, "get_ticket", id=4711))
    client.ask(call(2, "refund_ticket", id=4711, amount=20))
    clock, took = r"\d\d:\d\d:\d\d\.\d{3}Z", r"\d+\.\d+ms"
    fine = (
        rf"(?m)^{clock}  allow  agent:support-bot  get_ticket  success  rule=\S+  rev=\w+  {took}$"
    )
    shown(watcher, fine)
    denied = (
        rf'(?m)^{clock}  deny   agent:support-bot  refund_ticket  refund_needs_principal ".+"  '
    )
    shown(watcher, denied)
    assert "\x1b" not in text(watcher), "no colour where there is no terminal"


def test_who_it_is_for_and_what_it_is_about(tickets: Desk) -> None:
    (tickets.folder / "sidecar.yaml").write_text(
        "identity: {static: {type: agent, id: support-bot, on_behalf_of: {type: human, id: ana}}}\n"
        "resources: {get_ticket: 'ticket:{id}'}\n"
    )
    client = tickets.guard(who=("--policy", STARTER, "--config", tickets.folder / "sidecar.yaml"))
    client.ask(call(1, "get_ticket", id=4711))
    watcher = tickets.watch()
    shown(watcher, "agent:support-bot for human:ana  get_ticket  on ticket:4711  success")


def test_two_watchers_see_what_each_wants(tickets: Desk) -> None:
    client = tickets.guard()
    denials = tickets.watch("--decision", "deny", "--json")
    finds = tickets.watch("--tool", "get_*", "--actor", "agent:supp*")
    nobody = tickets.watch("--actor", "human")
    for number in range(3):
        client.ask(call(f"get {number}", "get_ticket", id=4711))
        client.ask(call(f"refund {number}", "refund_ticket", id=4711, amount=20))
    wait_until(lambda: len(denials.lines) == 6, "decision and outcome of three denials")
    wait_until(lambda: len(finds.lines) == 3, "three calls")
    assert {each["decision"] for each in denials.messages()} == {"deny"}
    assert text(finds).count("  get_ticket  success") == 3
    assert nobody.lines == []


def test_the_last_ones_are_shown_first(tickets: Desk) -> None:
    client = tickets.guard()
    for number in range(5):
        client.ask(call(number, "get_ticket", id=4711))
    watcher = tickets.watch("-n", "2", "--tool", "get_ticket")
    wait_until(lambda: len(watcher.lines) == 2, "the last two")
    client.ask(call("later", "get_ticket", id=4711))
    wait_until(lambda: len(watcher.lines) == 3, "the next one")


def test_records_are_those_of_the_audit_file(tickets: Desk) -> None:
    audit = tickets.folder / "audit.jsonl"
    client, watcher = tickets.guard("--audit", audit), tickets.watch("--json")
    client.ask(call(1, "get_ticket", id=4711))
    client.ask(call(2, "refund_ticket", id=4711, amount=20))
    written = [json.loads(line) for line in audit.read_text("utf-8").splitlines()]
    key: Callable[[dict[str, Any]], Any] = lambda each: (each["decision_id"], each["type"])  # noqa: E731
    wait_until(lambda: len(watcher.lines) >= len(written), "all records")
    assert sorted(watcher.messages(), key=key) == sorted(written, key=key)


# ── A terminal ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def terminal(command: list[str], env: dict[str, str]) -> Iterator[tuple[Callable[[str], str], int]]:
    """The command in a terminal: what waits until it has shown something, and its process id."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.set_blocking(master, False)
    seen = bytearray()

    def read() -> str:
        with suppress(OSError):  # nothing yet, or the end
            seen.extend(os.read(master, 65536))
        return seen.decode(errors="replace")

    def wait_for(pattern: str) -> str:
        return wait_until(lambda: read() if re.search(pattern, read()) else "", pattern)

    try:
        yield wait_for, process.pid
    finally:
        process.kill()
        process.wait(10)
        os.close(master)


@pytest.mark.parametrize(
    ("options", "env", "coloured"),
    [((), {}, True), ((), {"NO_COLOR": "1"}, False), (("--no-color",), {}, False)],
    ids=["colour", "NO_COLOR", "--no-color"],
)
def test_decisions_have_a_colour_in_a_terminal(
    tickets: Desk, options: tuple[str, ...], env: dict[str, str], coloured: bool
) -> None:
    client = tickets.guard(who=(*BOT[:2], "--actor", f"agent:{ESCAPES}"))
    client.ask(call(1, "refund_ticket", id=4711, amount=20))
    wanted = {name: value for name, value in tickets.env.items() if name != "NO_COLOR"} | env
    command = sidecar("tail", "--control", tickets.socket, *options)
    with terminal(command, wanted) as (wait_for, _):
        screen = wait_for(r"refund_ticket.*ms\r\n")
    assert ("\x1b[31mdeny \x1b[0m" in screen) is coloured
    rest = screen.replace("\x1b[31mdeny \x1b[0m", "").replace("\x1b[32mallow\x1b[0m", "")
    assert "\x1b" not in rest, "no escape but our own"
    assert not {"\x9b", "\u202e", "\x07"} & set(rest)


def test_names_that_others_choose_are_harmless(tickets: Desk) -> None:
    client = tickets.guard(who=(*BOT[:2], "--actor", f"agent:{ESCAPES}"))
    answers = [
        client.ask(request(1, f"tickets/{ESCAPES}", {})),
        client.ask(request(2, "resources/read", {"uri": "ticket://x/\u202e\u2066evil"})),
        client.ask(call(3, "עברית", id=1)),
        client.ask(call(4, "x  allow  agent:root", id=1)),
    ]
    assert all("error" in each for each in answers)
    lines, records = tickets.watch(), tickets.watch("--json")
    shown(lines, '"x  allow  agent:root"')
    shown(lines, r'agent:"\\x1b\[2J\\x1b\]0;owned\\x07\\x9b31m\\u202e\\r"')
    shown(records, "agent:root")
    for watcher in (lines, records):
        unusual = {each for each in text(watcher) if not (each.isprintable() or each == "\n")}
        assert not unusual
    assert "\u202e" not in text(lines) and "ע" not in text(lines)  # noqa: PT018
    assert all(line.startswith(b"{") for line in records.lines)


# ── Those who can not keep up ─────────────────────────────────────────────────────────────────────


def test_a_watcher_that_reads_nothing_slows_nobody_and_is_told_what_it_missed(
    tickets: Desk,
) -> None:
    client, watcher, other = tickets.guard(), tickets.watch("-n", "0"), tickets.watch("--json")
    wait_until(lambda: (client.ask(call(0, "get_ticket", id=4711)), watcher.lines)[1], "it watches")
    stopped = psutil.Process(watcher.process.pid)
    stopped.suspend()
    before = psutil.Process(client.process.pid).memory_info().rss
    try:
        for number in range(1, 400):
            client.send(call(number, f"{number}-" + "x" * 25_000))
            assert "error" in client.answer(number)
            client.forget()
        grown = psutil.Process(client.process.pid).memory_info().rss - before
    finally:
        stopped.resume()
    assert grown < 64 * 1024 * 1024
    shown(watcher, r"… \d+ records not shown")
    client.ask(call("after", "get_ticket", id=4711))
    shown(watcher, "not shown[^\n]*\n(?:.*\n)*.*get_ticket  success")
    shown(other, '"name":"399-')


# ── Those who come and go ─────────────────────────────────────────────────────────────────────────


def test_it_ends_with_one_line_when_the_sidecar_does(tickets: Desk) -> None:
    client, watcher = tickets.guard(), tickets.watch()
    shown(watcher, "initialize")
    client.end()
    assert watcher.wait_for_end() == 1
    assert watcher.process.lines == [f"mcp-sidecar: the sidecar on {tickets.socket} has ended"]
    assert client.wait_for_end() == 0
    assert not tickets.socket.exists(), "the socket is removed"


def test_a_sidecar_that_is_killed_is_gone_and_its_socket_is_replaced(tickets: Desk) -> None:
    first, watcher = tickets.guard(), tickets.watch()
    shown(watcher, "initialize")
    first.process.signal(signal.SIGKILL)
    assert watcher.wait_for_end() == 1
    assert tickets.socket.exists()
    tickets.guard()
    shown(tickets.watch(), "initialize")


def test_an_interrupt_is_no_error_of_anybodys(tickets: Desk) -> None:
    client, watcher = tickets.guard(), tickets.watch()
    shown(watcher, "initialize")
    watcher.process.signal(signal.SIGINT)
    assert watcher.wait_for_end() == 130
    assert watcher.process.lines == []
    assert "result" in client.ask(call(1, "get_ticket", id=4711))


def test_who_has_read_enough_ends_it(tickets: Desk) -> None:
    client = tickets.guard()
    command = sidecar("tail", "--control", tickets.socket, "--json")
    with subprocess.Popen(
        command, env=tickets.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watcher:
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline()
            watcher.stdout.close()
            for number in range(3):
                client.ask(call(number, "get_ticket", id=4711))
            assert watcher.wait(30) == 141
            assert watcher.stderr is not None
            assert watcher.stderr.read() == b""
        finally:
            watcher.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--control PATH, or MCP_SIDECAR_CONTROL"),
        (
            ("--control", "{folder}/none.sock"),
            "no sidecar can be watched on .*none.sock: No such file",
        ),
        (("--control", "{folder}/dead.sock"), "dead.sock: Connection refused"),
        (("--control", "{folder}"), "no sidecar can be watched"),
        (("--control", "x", "-n", "1000"), "0 to 999"),
        (("--control", "x", "--decision", "denied"), "invalid choice"),
    ],
)
def test_what_can_not_be_watched_is_said_in_a_line(
    tmp_path: Path, opa_bin: Path, options: tuple[str, ...], said: str
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    words = [each.format(folder=tmp_path) for each in options]
    with Process(sidecar("tail", *words), env=patient(opa_bin)) as process:
        assert process.wait() == 125
        assert re.search(said, process.tail())
        assert len(process.lines) <= 2


def test_the_variable_names_the_socket_to_both(tickets: Desk) -> None:
    env = {**tickets.env, "MCP_SIDECAR_CONTROL": str(tickets.socket)}
    command = sidecar("stdio", *BOT, "--", *tickets.server)
    with Process(command, env=env, pipes=True) as guarded:
        Pipe(guarded).greet()
        with Process(sidecar("tail"), env=env, pipes=True) as process:
            shown(Pipe(process), "initialize")


def test_help_teaches(opa_bin: Path) -> None:
    done = subprocess.run(
        sidecar("tail", "--help"), capture_output=True, text=True, timeout=30, check=True
    )
    for word in ("--control", "MCP_SIDECAR_CONTROL", "examples:", "--decision deny", "exit codes:"):
        assert word in done.stdout


# ── The socket ────────────────────────────────────────────────────────────────────────────────────


def test_the_socket_is_its_owners_alone(tickets: Desk) -> None:
    tickets.guard()
    assert stat.S_IMODE(tickets.socket.lstat().st_mode) == 0o600
    assert stat.S_IMODE(tickets.socket.parent.lstat().st_mode) == 0o700


def test_where_it_would_not_be_safe_there_is_none(tickets: Desk) -> None:
    folder = tickets.folder
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (folder / "link").symlink_to(folder / "open")
    (folder / "file").write_text("mine")
    (folder / "aside").symlink_to(folder / "file")
    for path, said in {
        "open/control.sock": "others can write",
        "link/control.sock": "no folder",
        "file": "is there, and no socket",
        "aside": "is there, and no socket",
        "none/there/control.sock": "No such file",
        "x" * 120: "at most 103 bytes",
    }.items():
        assert said in tickets.fails("--control", folder / path)
    assert (folder / "file").read_text() == "mine"


def test_one_that_is_in_use_is_not_taken(tickets: Desk) -> None:
    client = tickets.guard()
    assert "another process listens" in tickets.fails("--control", tickets.socket)
    shown(tickets.watch(), "initialize")
    assert "result" in client.ask(call(1, "get_ticket", id=4711))


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as it:
    try:
        it.connect(sys.argv[1])
    except OSError as error:
        print(error.strerror)
    else:
        it.sendall(b"GET /v1/decisions?last=9 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        print(it.recv(4096).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_in_by_no_mode_of_the_socket(tickets: Desk) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        tickets.socket = Path(folder) / "control.sock"
        client = tickets.guard()

        def stranger() -> str:
            command = [sys.executable, "-c", STRANGER, str(tickets.socket)]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=True, cwd="/"
            ).stdout

        assert "Permission denied" in stranger()
        tickets.socket.chmod(0o666)
        answer = stranger()
        assert answer.startswith("HTTP/1.1 403")
        assert "initialize" not in answer
        client.process.wait_for("refused user 65534")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("GET /v1/decisions?last=x", 400),
        ("GET /v1/decisions?who=me", 400),
        ("POST /v1/decisions", 405),
        ("GET /", 404),
        ("GET /v1/decisions?last=1", 200),
    ],
)
def test_the_api_says_what_it_takes(tickets: Desk, target: str, status: int) -> None:
    tickets.guard()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(tickets.socket))
        client.sendall(f"{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


def test_http_has_it_too_and_stops_at_once_though_somebody_watches(tickets: Desk) -> None:
    with (
        ticket_desk(tickets.folder / "log") as server,
        http_sidecar(server.url, *BOT, "--control", tickets.socket, env=tickets.env) as served,
    ):
        watchers = [tickets.watch() for _ in range(3)]
        post(served.url, initialize())
        for each in watchers:
            shown(each, "initialize  success")
        began = time.monotonic()
        assert served.process.stop() == 0
        assert time.monotonic() - began < 8
        assert [each.wait_for_end() for each in watchers] == [1] * 3


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────────

KEEPER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    found = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
             "serverInfo": {"name": "keeper", "version": "1"}}
    if asked["method"] == "tools/list":
        found = {"tools": [{"name": "open", "inputSchema": {"type": "object"}}]}
    if asked["method"] == "tools/call":
        found = {"content": [{"type": "text", "text": "password=hunter2-result"}],
                 "structuredContent": {"status": "SHOWN-result", "api_key": "hunter2-result"}}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": found}), flush=True)
"""
RECORDED = """
audit: {arguments: true, results: true}
telemetry: {arguments: true, results: true}
masking: {shown: [arguments, result.structuredContent]}
"""


@pytest.mark.parametrize("recorded", [True, False], ids=["switched on", "off"])
def test_no_secret_is_in_any_record(tickets: Desk, recorded: bool) -> None:
    config, audit = tickets.folder / "sidecar.yaml", tickets.folder / "audit.jsonl"
    config.write_text(RECORDED if recorded else "{}")
    tickets.server = [sys.executable, "-c", KEEPER]
    with Sink() as sink:
        options = ("--config", config, "--audit", audit, "--otlp", sink.url)
        client = tickets.guard(*options, who=("--policy", STARTER.parent / "allow_all"))
        watcher = tickets.watch("--json", "--tool", "open")
        params = {"password": SECRETS[0], "note": f"Bearer {SECRETS[2]}", "id": "SHOWN-argument"}
        answer = client.ask(call(1, "open", **params))
        assert SECRETS[1] in json.dumps(answer), "the caller gets it all"
        wait_until(lambda: len(watcher.lines) == 2, "decision and outcome")
        spans = sink.wait_for(3, where=lambda span: span.name.startswith(("tools/call", "policy")))
    places = [text(watcher), audit.read_text("utf-8"), repr(spans), client.process.tail(1000)]
    assert not [each for each in SECRETS for place in places if each in place]
    for place in places[:3]:
        assert ("SHOWN-argument" in place) is recorded
        assert ("SHOWN-result" in place) is recorded
    if recorded:
        (outcome,) = (each for each in watcher.messages() if each["type"] == "outcome")
        content = [{"type": "<string 4>", "text": "<string 23>"}]
        structured = {"status": "SHOWN-result", "api_key": "<masked>"}
        assert outcome["result"] == {"content": content, "structuredContent": structured}
