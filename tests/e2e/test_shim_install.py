"""`mcp-sidecar shim --install`: the shim in an image that has no Python, no libc and no shell."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sidecar import shim as shim_file
from tests.conftest import require
from tests.support.processes import ROOT, Process, environment, sidecar, wait_until
from tests.support.shims import ask, line

SERVER = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
extern char **environ;
int main(int count, char **words) {
    char said[4096];
    FILE *entries = fopen("/server", "r");
    printf("{\"uid\": %d, \"word\": \"%s\", \"environ\": \"", getuid(), words[1]);
    for (char **each = environ; *each; each++) printf("%s ", *each);
    printf("\", \"next\": %d, \"writable\": %d}\n", fileno(entries), access("/", W_OK) == 0);
    while (fgets(said, sizeof said, stdin)) { fputs(said, stdout); fflush(stdout); }
    return 7;
}
"""
USER = 1001

# A root of its own, which nobody can write to: `chroot` becomes the user, without any capability.
ENTER = """
set -e
mount --bind "$0" "$0"
mount --bind "$1" "$0/mcp-shim" && mount -o remount,bind,ro "$0/mcp-shim"
mount --bind "$2" "$0/run"
mount -o remount,bind,ro "$0"
mount -t proc proc "$0/proc"
root=$0; shift 2
exec env -i A=1 "$(command -v chroot)" --userspec=1001:1001 --groups= "$root" "$@"
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tools"
    command = sidecar("shim", "--install", folder)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(f"{folder}: ")
    assert done.stdout.endswith(" MiB\n")
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds one static program, and places for mounts."""
    compiler = require("a C compiler", _compiler(), "apt-get install gcc libc6-dev")
    root = tmp_path_factory.mktemp("image")
    for each in ("mcp-shim", "run", "proc"):
        (root / each).mkdir()
    root.chmod(0o755)
    source = root.parent / "server.c"
    source.write_text(SERVER, encoding="utf-8")
    words = [str(compiler), "-static", "-O1", "-o", str(root / "server"), str(source)]
    subprocess.run(words, check=True, timeout=60)
    return root


def _compiler() -> Path | None:
    found = shutil.which("cc") or shutil.which("gcc")
    return Path(found) if found else None


@contextmanager
def running(image: Path, bundle: Path, run: Path, *words: str) -> Iterator[Process]:
    """The shim as the main process of a container of that image; only root can have this."""
    if os.getuid() != 0:
        pytest.skip("missing: namespaces (run as root)")
    run.chmod(0o777)
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    shim = [*shim_file.words("/mcp-shim"), "--socket", "/run/desk.sock", "--drain", "0"]
    places = [str(each) for each in (image, bundle, run)]
    with Process([*apart, "sh", "-c", ENTER, *places, *shim, *words]) as process:
        path = run / "desk.sock"
        wait_until(lambda: path.is_socket() or process.ended, "the shim listens")
        try:
            yield process
        finally:
            for each in [] if process.ended else psutil.Process(process.pid).children():
                each.terminate()  # `unshare` does not hand it on
            process.wait()


def connected(run: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(run / "desk.sock"))
    return client


def test_it_is_small(bundle: Path) -> None:
    files = [each for each in bundle.rglob("*") if each.is_file()]
    size = sum(each.stat().st_size for each in files)
    print(f"{len(files)} files, {size / 2**20:.1f} MiB")
    assert size < 48 * 2**20
    assert all(each.stat().st_mode & 0o044 == 0o044 for each in files)  # it is another user's


def test_again_in_the_same_place(bundle: Path) -> None:
    def content() -> dict[str, bytes]:
        files = (each for each in bundle.rglob("*") if each.is_file())
        return {str(each): each.read_bytes() for each in files}

    before = content()
    subprocess.run(
        sidecar("shim", "--install", bundle), cwd=ROOT, check=True, timeout=60, capture_output=True
    )
    assert content() == before


def test_it_serves_where_there_is_nothing_else(bundle: Path, image: Path, tmp_path: Path) -> None:
    """Read-only, as another user; and the server sees nothing of it."""
    assert sorted(each.name for each in image.iterdir()) == ["mcp-shim", "proc", "run", "server"]
    with (
        running(image, bundle, tmp_path, "--peer", "0", "--", "/server", "one"),
        connected(tmp_path) as client,
    ):
        seen = json.loads(ask(client, "hello"))
        assert line(client) == "hello"
    assert seen == {"uid": USER, "word": "one", "environ": "A=1 ", "next": 3, "writable": 0}


def test_nobody_but_its_own_user_is_served_unless_it_is_said(
    bundle: Path, image: Path, tmp_path: Path
) -> None:
    with running(image, bundle, tmp_path, "--", "/server", "one") as process:
        with connected(tmp_path) as client:
            assert client.recv(1) == b""
        process.wait_for("refused a connection of uid 0")


@pytest.mark.parametrize(
    ("words", "code"),
    [(("/server-of-nobody",), 127), (("/run",), 126), (("/mcp-shim/shim.py",), 126)],
    ids=["not there", "a folder", "no program"],
)
def test_what_can_not_be_started_is_seen(
    bundle: Path, image: Path, tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    with running(image, bundle, tmp_path, "--", *words) as process:
        assert process.wait() == code
        [said] = process.lines
        assert f"{words[0]!r} can not be started" in said
