"""``.ci/install-opa`` finds or installs an OPA, or says on one screen what to do.

Each test gives it a PATH of its own, made of links to just the tools that it names: so Go, or a
downloader, is really absent. The downloads come from a server on this machine.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "install-opa"
PINNED = SCRIPT.read_text(encoding="utf-8").split("\nVERSION=")[1].split()[0]
BASICS = ["sh", "dirname", "mktemp", "mkdir", "date", "sed", "tail", "rm", "mv", "ln", "chmod"]
SYSTEM = {"Linux": "linux", "Darwin": "darwin"}.get(platform.system(), platform.system())
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
ASSET = f"opa_{SYSTEM}_{MACHINE}" + ("" if (SYSTEM, MACHINE) == ("darwin", "amd64") else "_static")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_opa(path: Path, version: str) -> Path:
    return script(path, f'[ "$1" = version ] && echo "Version: {version}" && echo "Platform: test"')


@pytest.fixture
def release(opa_bin: Path, tmp_path: Path) -> Path:
    """The real OPA of this machine; a script that answers alike where it is of another version."""
    answer = subprocess.run([opa_bin, "version"], capture_output=True, text=True, check=True)
    if f"Version: {PINNED}\n" in answer.stdout:
        return opa_bin
    answers = f"version) echo Version: {PINNED} ;; eval) echo '\"value\": 2' ;;"
    return script(tmp_path / "release-opa", f'case "$1" in {answers} esac')


@dataclass
class Machine:
    """A machine with the tools that a test gives it, and nothing else."""

    home: Path

    def __post_init__(self) -> None:
        self.bin.mkdir(parents=True)
        self.has(*BASICS, "uname")

    @property
    def bin(self) -> Path:
        return self.home / "bin"

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "mcp-opa-sidecar"

    def has(self, *tools: str) -> None:
        for tool in tools:
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"missing: {tool} (install it)")
            (self.bin / tool).symlink_to(Path(found).absolute())

    def can_download(self) -> None:
        self.has("curl" if shutil.which("curl") else "wget")
        self.has("sha256sum" if shutil.which("sha256sum") else "openssl")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments],
            env={"HOME": str(self.home), "PATH": str(self.bin)} | environment,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    def left_in_cache(self) -> list[str]:
        return sorted(path.name for path in self.cache.rglob("*") if path.name != "bin")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home")


@dataclass
class ReleasePage:
    """A folder of release files, served on this machine."""

    folder: Path
    url: str

    def offer(self, binary: Path, checksum: str | None = None) -> str:
        shutil.copyfile(binary, self.folder / ASSET)
        actual = hashlib.sha256(binary.read_bytes()).hexdigest()
        (self.folder / f"{ASSET}.sha256").write_text(f"{checksum or actual}  {ASSET}\n")
        return actual


@pytest.fixture
def release_page(tmp_path: Path) -> Iterator[ReleasePage]:
    folder = tmp_path / "release"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield ReleasePage(folder, f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def assert_uses(done: subprocess.CompletedProcess[str], expected: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected}\n"


def assert_one_screen(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) <= 24, done.stderr
    for word in words:
        assert word in done.stderr


# ── An OPA that is there is used as it is ─────────────────────────────────────────────────────────


def test_opa_on_path_is_used_as_it_is(machine: Machine) -> None:
    ours = fake_opa(machine.bin / "opa", "1.2.3")
    assert_uses(machine.run(), ours)
    assert machine.left_in_cache() == []


def test_the_named_opa_wins_over_path(machine: Machine, tmp_path: Path) -> None:
    fake_opa(machine.bin / "opa", "1.2.3")
    named = fake_opa(tmp_path / "my-opa", "1.0.0")
    assert_uses(machine.run(MCP_SIDECAR_OPA_BIN=str(named)), named)


@pytest.mark.parametrize("version", ["0.60.0", ""], ids=["too old", "no OPA at all"])
def test_a_named_opa_that_cannot_be_used_is_an_error(
    machine: Machine, tmp_path: Path, version: str
) -> None:
    fake_opa(machine.bin / "opa", "1.2.3")
    named = fake_opa(tmp_path / "my-opa", version)
    done = machine.run(MCP_SIDECAR_OPA_BIN=str(named))
    assert_one_screen(done, "MCP_SIDECAR_OPA_BIN", str(named), "1.0 or later")


def test_a_named_opa_that_does_not_exist_is_an_error(machine: Machine) -> None:
    assert_one_screen(machine.run(MCP_SIDECAR_OPA_BIN="/nowhere/opa"), "/nowhere/opa")


def test_opa_on_path_that_is_too_old_is_passed_over(machine: Machine) -> None:
    fake_opa(machine.bin / "opa", "0.60.0")
    cached = machine.cache / "bin" / f"opa-{PINNED}"
    cached.parent.mkdir(parents=True)
    fake_opa(cached, PINNED)
    done = machine.run()
    assert_uses(done, machine.cache / "bin" / "opa")
    assert f"{machine.bin}/opa: version 0.60.0" in done.stderr
    assert (machine.cache / "bin" / "opa").resolve() == cached.resolve()


def test_find_installs_nothing(machine: Machine, release_page: ReleasePage, release: Path) -> None:
    machine.can_download()
    release_page.offer(release)
    done = machine.run("--find", OPA_DOWNLOAD_URL=release_page.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert machine.left_in_cache() == []


# ── Go ────────────────────────────────────────────────────────────────────────────────────────────


def fake_go(machine: Machine, body: str) -> None:
    script(machine.bin / "go", f'echo "$CGO_ENABLED $*" > "$HOME/go-was-called"\n{body}')


def test_go_installs_the_pinned_version(machine: Machine) -> None:
    source = fake_opa(machine.home / "built", PINNED)
    machine.has("cp")
    fake_go(machine, f'cp "{source}" "$GOBIN/opa"')
    assert_uses(machine.run(), machine.cache / "bin" / "opa")
    called = (machine.home / "go-was-called").read_text()
    assert called == f"0 install github.com/open-policy-agent/opa@v{PINNED}\n"
    assert machine.left_in_cache() == ["opa", f"opa-{PINNED}"]

    (machine.bin / "go").unlink()
    assert_uses(machine.run(), machine.cache / "bin" / "opa")


def test_where_go_fails_the_release_is_downloaded(
    machine: Machine, release_page: ReleasePage, release: Path
) -> None:
    machine.can_download()
    fake_go(machine, "echo no network for modules >&2; exit 1")
    release_page.offer(release)
    done = machine.run(OPA_DOWNLOAD_URL=release_page.url)
    assert_uses(done, machine.cache / "bin" / "opa")
    assert "no network for modules" in done.stderr


# ── No Go: the release binary ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "tools",
    [
        pytest.param(("curl", "sha256sum"), id="curl"),
        pytest.param(("wget", "openssl"), id="wget"),
        pytest.param(("python3",), id="python"),
    ],
)
def test_a_release_with_the_right_checksum_is_installed_and_runs(
    machine: Machine, release_page: ReleasePage, release: Path, tools: tuple[str, ...]
) -> None:
    for tool in tools:
        if tool == "python3":  # the real one: a version manager's shim needs more than it is given
            script(machine.bin / "python3", f'exec "{real_python()}" "$@"')
        else:
            machine.has(tool)
    release_page.offer(release)
    done = machine.run(OPA_DOWNLOAD_URL=release_page.url + "/")
    installed = machine.cache / "bin" / "opa"
    assert_uses(done, installed)
    assert machine.left_in_cache() == ["opa", f"opa-{PINNED}"]
    answer = subprocess.run(
        [installed, "eval", "1 + 1"], capture_output=True, text=True, check=True
    )
    assert '"value": 2' in answer.stdout


def real_python() -> str:
    answer = subprocess.run(
        ["python3", "-c", "import sys; print(sys.executable)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.strip()


Tampering = Callable[[ReleasePage, Path], dict[str, str]]


def wrong_sum(page: ReleasePage, binary: Path) -> dict[str, str]:
    page.offer(binary, checksum="0" * 64)
    return {}


def changed_binary(page: ReleasePage, binary: Path) -> dict[str, str]:
    page.offer(binary)
    with (page.folder / ASSET).open("ab") as file:
        file.write(b"\n# one more line\n")
    return {}


def empty_sum(page: ReleasePage, binary: Path) -> dict[str, str]:
    page.offer(binary)
    (page.folder / f"{ASSET}.sha256").write_text("")
    return {}


def no_sum(page: ReleasePage, binary: Path) -> dict[str, str]:
    page.offer(binary)
    (page.folder / f"{ASSET}.sha256").unlink()
    return {}


def not_the_expected_sum(page: ReleasePage, binary: Path) -> dict[str, str]:
    page.offer(binary)
    return {"OPA_SHA256": "1" * 64}


@pytest.mark.parametrize(
    "tamper", [wrong_sum, changed_binary, empty_sum, no_sum, not_the_expected_sum]
)
def test_a_release_without_the_right_checksum_is_refused(
    machine: Machine, release_page: ReleasePage, tmp_path: Path, tamper: Tampering
) -> None:
    machine.can_download()
    environment = tamper(release_page, fake_opa(tmp_path / "opa-to-offer", PINNED))
    done = machine.run(OPA_DOWNLOAD_URL=release_page.url, **environment)
    assert_one_screen(done, "OPA_DOWNLOAD_URL")
    assert "SHA-256" in done.stderr or "checksum" in done.stderr
    assert machine.left_in_cache() == []


def test_no_tool_to_check_with_refuses_too(
    machine: Machine, release_page: ReleasePage, tmp_path: Path
) -> None:
    machine.has("curl")
    release_page.offer(fake_opa(tmp_path / "opa-to-offer", PINNED))
    assert_one_screen(machine.run(OPA_DOWNLOAD_URL=release_page.url), "no sha256sum")
    assert machine.left_in_cache() == []


def test_the_sum_of_the_environment_is_accepted_when_it_is_right(
    machine: Machine, release_page: ReleasePage, tmp_path: Path
) -> None:
    machine.can_download()
    actual = release_page.offer(fake_opa(tmp_path / "opa-to-offer", PINNED))
    done = machine.run(OPA_DOWNLOAD_URL=release_page.url, OPA_SHA256=actual)
    assert_uses(done, machine.cache / "bin" / "opa")


def test_another_version_than_the_pinned_one_is_refused(
    machine: Machine, release_page: ReleasePage, tmp_path: Path
) -> None:
    machine.can_download()
    release_page.offer(fake_opa(tmp_path / "opa-to-offer", "1.0.0"))
    done = machine.run(OPA_DOWNLOAD_URL=release_page.url)
    assert_one_screen(done, PINNED, "1.0.0")
    assert machine.left_in_cache() == []


# ── Nothing works ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("downloader", [False, True], ids=["no tools", "dead address"])
def test_when_nothing_works_one_screen_says_what_to_install(
    machine: Machine, downloader: bool
) -> None:
    if downloader:
        machine.can_download()
    done = machine.run(OPA_DOWNLOAD_URL="http://127.0.0.1:9/opa")
    assert_one_screen(done, "install go", "install opa", "OPA_DOWNLOAD_URL", "MCP_SIDECAR_OPA_BIN")
    assert machine.left_in_cache() == []


def test_an_unknown_machine_is_named(machine: Machine) -> None:
    (machine.bin / "uname").unlink()
    script(machine.bin / "uname", '[ "$1" = -s ] && echo Plan9 || echo mips')
    assert_one_screen(machine.run(), "Plan9", "mips", "OPA_DOWNLOAD_URL")


def test_the_cache_can_be_elsewhere(machine: Machine, tmp_path: Path) -> None:
    cached = tmp_path / "elsewhere" / "bin" / f"opa-{PINNED}"
    cached.parent.mkdir(parents=True)
    fake_opa(cached, PINNED)
    done = machine.run(MCP_SIDECAR_CACHE=str(tmp_path / "elsewhere"))
    assert_uses(done, tmp_path / "elsewhere" / "bin" / "opa")
    assert (tmp_path / "elsewhere" / "bin" / "opa").readlink() == Path(f"opa-{PINNED}")
