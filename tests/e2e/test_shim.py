"""`shim.py` alone: processes for connections, and how both end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.processes import Process, alive, held, sidecar, wait_until
from tests.support.shims import ALONE, Shim, ask, line, rest, shim

ECHO = ["sh", "-c", "echo $$; exec cat"]
"""Says its process id, and then what it hears."""

PYTHON = [sys.executable, "-I", "-S", "-c"]


def waiting(found: Shim) -> int:
    """The process that waits for the next connection."""
    wait_until(lambda: len(found.servers()) == 1, "one waits")
    return found.servers()[0]


# ── A process for each connection ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("program", [ALONE, sidecar("shim")], ids=["alone", "command"])
def test_each_connection_has_a_process_of_its_own(tmp_path: Path, program: list[str]) -> None:
    with shim(ECHO, tmp_path, program=program) as found, found.connect() as one:
        first = waiting(found)
        assert ask(one, "a") == str(first)
        assert line(one) == "a"
        with found.connect() as other:
            second = int(ask(other, "b"))
            assert second != first
            assert (line(other), ask(one, "c"), ask(other, "d")) == ("b", "c", "d")
            assert first in found.servers()
        wait_until(lambda: not alive(second), "the second has ended")
        assert ask(one, "e") == "e"


def test_twenty_at_once(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path) as found:
        clients = [found.connect() for _ in range(20)]
        for number, each in enumerate(clients):
            each.sendall(f"{number}\n".encode())
        pids = {line(each) for each in clients}
        assert [line(each) for each in clients] == [str(number) for number in range(20)]
        assert len(pids) == 20
        for each in clients:
            each.close()
        wait_until(lambda: len(found.servers()) == 1, "one waits, and there is no other")


def test_who_says_nothing_costs_no_process(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path) as found:
        before = waiting(found)
        for _ in range(50):
            found.connect().close()
        silent = found.connect()
        with found.connect() as client:
            assert ask(client, "a") == str(before)
        silent.close()


def test_bytes_are_not_looked_at_and_nobody_has_to_be_quick(tmp_path: Path) -> None:
    """More than pipes and sockets hold, in both directions, with a reader that comes late."""
    said = os.urandom(1 << 20) * 20
    with shim(["cat"], tmp_path) as found, found.connect() as client:

        def tell() -> None:
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)

        telling = threading.Thread(target=tell)
        telling.start()
        wait_until(lambda: _is_stuck(found), "nothing goes on until somebody reads")
        heard = rest(client)
        telling.join()
        assert heard == said


def _is_stuck(found: Shim) -> bool:
    """It holds a piece for each direction, and not what has come since."""
    process = psutil.Process(found.process.pid)
    before = process.io_counters().read_chars
    time.sleep(0.1)
    return bool(65536 < before == process.io_counters().read_chars)


def test_the_bound_holds_and_room_is_made_again(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path, "--children", "2") as found:
        one, two = found.connect(), found.connect()
        assert ask(one, "a")
        assert ask(two, "b")
        with found.connect() as third:
            assert rest(third) == b""
        found.process.wait_for("refused a connection: there are 2")
        one.close()

        def served() -> bool:
            with found.connect() as client, suppress(OSError):
                return ask(client, "c") != ""
            return False

        wait_until(served, "there is room for another")
        two.close()


def test_nothing_stays_behind(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path) as found:
        waiting(found)
        before = held(found.process.pid)
        for _ in range(30):
            with found.connect() as client:
                assert ask(client, "a")
        wait_until(lambda: held(found.process.pid) == before, f"again {before}")


# ── What a server sees ────────────────────────────────────────────────────────────────────────────

LOOK = """
import json, os
status = open("/proc/self/status").read().splitlines()
input()
print(json.dumps({
    "environ": open("/proc/self/environ").read(), "files": sorted(os.listdir("/proc/self/fd")),
    "kinds": [os.readlink(f"/proc/self/fd/{n}")[:4] for n in (0, 1)],
    "blocked": [each.split()[1] for each in status if each.startswith("SigBlk")],
    "nonblocking": [not os.get_blocking(n) for n in (0, 1)], "cwd": os.getcwd(),
}), flush=True)
"""


def test_a_server_is_as_it_would_be_without(tmp_path: Path) -> None:
    """Its variables are those that were given, no descriptor is there that it does not know."""
    env = {"PATH": os.environ["PATH"], "A": "1 2", "EMPTY": ""}
    with shim([*PYTHON, LOOK], tmp_path, env=env) as found, found.connect() as client:
        seen = json.loads(ask(client, ""))
    assert dict(each.split("=", 1) for each in seen["environ"].split("\0") if each) == env
    assert seen["files"] == ["0", "1", "2", "3"]  # the last one is what lists them
    assert seen["kinds"] == ["pipe", "pipe"]
    assert seen["nonblocking"] == [False, False]
    assert seen["cwd"] == str(Path.cwd())
    assert [int(each, 16) for each in seen["blocked"]] == [0]


def test_no_signal_is_ignored_that_was_not_before(tmp_path: Path) -> None:
    line = "grep SigIgn /proc/self/status"
    python = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)  # ignored by Python, for itself
    before = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    with shim(["sh", "-c", f"read x; exec {line}"], tmp_path) as found, found.connect() as client:
        ignored = int(ask(client, "").split()[1], 16)
    assert ignored & (1 << 31) - 1 & ~int(before.split()[1], 16) == 0  # 32 and 33 are glibc's own
    assert ignored & python == 0


def test_stderr_is_the_log_of_the_container(tmp_path: Path) -> None:
    with shim(["sh", "-c", "echo hello >&2; exec cat"], tmp_path) as found:
        found.process.wait_for("^hello$")


# ── Who is served ─────────────────────────────────────────────────────────────────────────────────


def test_only_one_user_is_served(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path, "--peer", str(os.getuid() + 1)) as found:
        with found.connect() as client:
            with suppress(OSError):
                client.sendall(b"a\n")
            with suppress(ConnectionError):
                assert rest(client) == b""
        found.process.wait_for(f"refused a connection of uid {os.getuid()}")
        assert len(found.servers()) == 1


# ── Ends ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["false"], 1, "has ended with 1"),
        (["true"], 0, "has ended with 0"),
        (["sh", "-c", "exit 42"], 42, "has ended with 42"),
        (["sh", "-c", "kill -9 $$"], 137, "has ended with 137"),
        (["no-such-server"], 127, "'no-such-server' can not be started: No such file"),
        (["/no/such/server"], 127, "'/no/such/server' can not be started: No such file"),
        (["/etc/passwd"], 126, "'/etc/passwd' can not be started: Permission denied"),
        (["/"], 126, "'/' can not be started: Permission denied"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_server_that_does_not_stay_is_seen(
    tmp_path: Path, command: list[str], code: int, words: str
) -> None:
    path = tmp_path / "desk.sock"
    with Process([*ALONE, "--socket", str(path), "--", *command]) as process:
        assert process.wait() == code
        [said] = process.lines
        assert words in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--socket", "s"], "there is no COMMAND"),
        (["--"], "there is no COMMAND"),
        (["--sokcet", "s", "--", "cat"], "unrecognized arguments: --sokcet"),
        (["--peer", "ana", "--", "cat"], "argument --peer: invalid int value"),
        (["--socket", "/no/such/folder/s", "--", "cat"], "can not listen on /no/such/folder/s: No"),
        (["--socket", f"/tmp/{'x' * 200}", "--", "cat"], "AF_UNIX path too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_usage_is_a_line(words: list[str], said: str) -> None:
    with Process([*ALONE, *words]) as process:
        assert process.wait() == 125
        [line] = process.lines
        assert said in line


def test_a_client_that_has_no_more_to_say_hears_the_last_words(tmp_path: Path) -> None:
    command = ["sh", "-c", "cat >/dev/null; echo last words"]
    with shim(command, tmp_path) as found, found.connect() as client:
        client.sendall(b"a\n")
        client.shutdown(socket.SHUT_WR)
        assert rest(client) == b"last words\n"


STUBBORN = """
import signal, sys
def told(number, frame): print("TERM", file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, told)
input()
print("here", flush=True)
sys.stdin.read()
print("EOF", file=sys.stderr, flush=True)
while True: signal.pause()
"""


def test_a_server_that_will_not_end_is_ended(tmp_path: Path) -> None:
    """Its stdin is closed, 5 s later it is sent SIGTERM, 2 s later SIGKILL."""
    with shim([*PYTHON, STUBBORN], tmp_path) as found:
        pid = waiting(found)
        with found.connect() as client:
            assert ask(client, "") == "here"
        began = time.monotonic()
        found.process.wait_for("^EOF$")
        assert time.monotonic() - began < 4
        found.process.wait_for("^TERM$")
        assert 4 < time.monotonic() - began < 7
        wait_until(lambda: not alive(pid), "it has ended")
        assert 6 < time.monotonic() - began < 12


def test_also_one_that_does_not_read_when_its_client_goes(tmp_path: Path) -> None:
    with shim(["sleep", "1000"], tmp_path) as found:
        pid = waiting(found)
        with found.connect() as client:
            client.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    client.send(b"x" * 65536)
        wait_until(lambda: not alive(pid), "it has ended")


def test_what_a_server_has_started_ends_with_it(tmp_path: Path) -> None:
    command = ["sh", "-c", "read x; sleep 1000 & echo $!; echo bye"]
    with shim(command, tmp_path) as found, found.connect() as client:
        child = int(ask(client, ""))
        assert rest(client) == b"bye\n"
        wait_until(lambda: not alive(child), "it has ended")


def test_a_process_that_got_away_does_not_keep_a_session(tmp_path: Path) -> None:
    command = ["sh", "-c", "read x; setsid sh -c 'echo $$; exec sleep 1000' & read x; echo bye"]
    with shim(command, tmp_path) as found, found.connect() as client:
        child = int(ask(client, ""))
        try:
            client.sendall(b"\n")
            assert rest(client) == b"bye\n"
            assert alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_server_that_closes_its_stdout_has_no_more_to_say(tmp_path: Path) -> None:
    command = ["sh", "-c", "read x; exec >&-; exec sleep 1000"]
    with shim(command, tmp_path) as found:
        pid = waiting(found)
        with found.connect() as client:
            assert ask(client, "") == ""
            assert alive(pid)
        wait_until(lambda: not alive(pid), "it has ended")


ONLY_ONE = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError: sys.exit(3)
print(os.getpid(), flush=True)
for line in sys.stdin: print(line, end="", flush=True)
"""


def test_of_a_server_that_can_only_be_one_whoever_has_it_keeps_it(tmp_path: Path) -> None:
    with shim([*PYTHON, ONLY_ONE, str(tmp_path / "lock")], tmp_path) as found:
        with found.connect() as client:
            first = ask(client, "a")
            found.process.wait_for("another server has ended with 3")
            assert (line(client), ask(client, "b")) == ("a", "b")
            with found.connect() as other:
                other.sendall(b"a\n")
                assert rest(other) == b""
            assert ask(client, "c") == "c"
        wait_until(lambda: len(found.servers()) == 1, "the next one waits")
        with found.connect() as client:
            assert ask(client, "a") != first


# ── The end of the container ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_takes_nobody_and_lets_sessions_finish(
    tmp_path: Path, number: signal.Signals
) -> None:
    with shim(ECHO, tmp_path, "--drain", "60") as found, found.connect() as client:
        assert ask(client, "a")
        assert line(client) == "a"
        silent = found.connect()
        found.process.signal(number)
        with silent:
            assert rest(silent) == b""
        assert not found.path.exists()
        assert ask(client, "b") == "b"
        client.close()
        assert found.process.wait() == 0


@pytest.mark.parametrize(("drain", "times"), [("0.2", 1), ("60", 2)])
def test_in_the_end_sessions_are_ended(tmp_path: Path, drain: str, times: int) -> None:
    with shim(ECHO, tmp_path, "--drain", drain) as found, found.connect() as client:
        pid = int(ask(client, "a"))
        for _ in range(times):
            found.process.signal()
            wait_until(lambda: not found.path.exists(), "it has heard")
        assert rest(client) == b"a\n"
        assert found.process.wait() == 0
        assert not alive(pid)


def test_a_server_that_waits_is_ended_with_the_container(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path) as found:
        pid = waiting(found)
        found.process.signal()
        assert found.process.wait() == 0
        assert not alive(pid)


def test_a_socket_of_a_life_before_is_replaced(tmp_path: Path) -> None:
    with shim(ECHO, tmp_path) as found:
        found.process.signal(signal.SIGKILL)
        found.process.wait()
        inode = found.path.stat().st_ino
        with pytest.raises(ConnectionRefusedError):
            found.connect()
    with Process([*ALONE, "--socket", str(found.path), "--", *ECHO]) as process:
        wait_until(lambda: found.path.stat().st_ino != inode, "there is another one")
        with Shim(process, found.path).connect() as client:
            assert ask(client, "a")
