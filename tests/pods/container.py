"""One process in namespaces of its own, as a container runtime starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.pods.spec import Json
from tests.support.processes import wait_until

ENTERING = Path(__file__).with_name("entering.py")

RUNTIME_CAPABILITIES = (
    "chown", "dac_override", "fsetid", "fowner", "mknod", "net_raw", "setgid", "setuid", "setfcap",
    "setpcap", "net_bind_service", "sys_chroot", "kill", "audit_write",
)  # fmt: skip
"""What containers hold unless their specification drops it (containerd, runc)."""


@dataclass(frozen=True, slots=True)
class Image:
    """What stands for an image: folders of this machine, and who runs in it."""

    folders: Mapping[str, Path]  # by the place where the container sees them
    over_usr: tuple[Path, ...] = ()  # laid over this machine's /usr
    env: Mapping[str, str] = field(default_factory=dict)
    user: int = 1001
    group: int = 1001
    entrypoint: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume, as a container sees it."""

    source: Path
    target: str
    read_only: bool


class Container:
    """A container that runs until its command ends, or it is ended."""

    def __init__(
        self,
        spec: Json,
        image: Image,
        *,
        mounts: Sequence[Mount],
        env: Mapping[str, str],
        command: Sequence[str],
        network: Path,
        root: Path,
        log: Path,
        pod_context: Json,
    ) -> None:
        self._env = {"PATH": "/usr/local/bin:/usr/bin:/bin", **image.env, **env}
        self._as = _as_user(spec.get("securityContext") or {}, pod_context, image)
        context = spec.get("securityContext") or {}
        said = {
            "root": str(root),
            "mounts": [
                *_base(image, mounts, root.with_suffix(".places")),
                *(_bound(each) for each in mounts),
            ],
            "links": {each: f"usr/{each}" for each in ("bin", "sbin", "lib", "lib64")},
            "read_only": bool(context.get("readOnlyRootFilesystem")),
            "command": [*self._as, *command],
        }
        entered, entering = os.pipe()
        said["entered"] = entering
        apart = ["--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation"]
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [
                    "nsenter", f"--net={network}", "unshare", *apart, "private",
                    sys.executable, "-I", str(ENTERING), json.dumps(said),
                ],
                cwd="/", env=self._env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=(entering,),
            )  # fmt: skip
        os.close(entering)
        os.read(entered, 1)  # written when the container has its own root, or never
        os.close(entered)

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._popen.poll()

    def pid(self) -> int:
        """Of its first process, as this machine knows it."""

        def first() -> int | None:
            with suppress(psutil.NoSuchProcess):
                return next((each.pid for each in self._children()), None)
            return None

        found = wait_until(lambda: first() or (-1 if self.code is not None else None), "a process")
        if found is None or found == -1:
            raise ProcessLookupError("the container has ended")
        return found

    def exec(self, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
        """Run a command in it, as `kubectl exec` and hooks do."""
        inside = ["--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd"]
        return subprocess.run(
            ["nsenter", f"--target={self.pid()}", *inside, *self._as, *command],
            env=self._env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout,
            check=False,
        )  # fmt: skip

    def signal(self, number: int = signal.SIGTERM) -> None:
        """To its first process; one that is gone does not mind."""
        with suppress(ProcessLookupError):
            os.kill(self.pid(), number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(max(seconds, 0))
        return self.code is not None

    def kill(self) -> None:
        """End it at once, and everything in it: its first process takes all others along."""
        self.signal(signal.SIGKILL)
        if not self.wait(5):
            self._popen.kill()
            self._popen.wait(5)

    def _children(self) -> list[Any]:
        return list(psutil.Process(self._popen.pid).children())


def _base(image: Image, mounts: Sequence[Mount], places: Path) -> list[Json]:
    """This machine's programs, read-only, with what the image has of its own.

    Overlays can not be written to, so the places for mounts lie over them from the start.
    """
    for each in mounts:
        place = places / each.target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if each.source.is_dir():
            place.mkdir(exist_ok=True)
        else:
            place.touch()
    found: list[Json] = []
    for target, over in (("/usr", image.over_usr), ("/etc", ())):
        (places / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        lower = [places / target.lstrip("/"), *over, Path(target)]
        found.append({"target": target, "lower": [str(each) for each in lower]})
    folders, python = dict(image.folders), Path(sys.base_prefix)
    if not python.is_relative_to("/usr"):
        folders[str(python)] = python
    return [*found, *(_bound(Mount(path, at, read_only=True)) for at, path in folders.items())]


def _bound(mount: Mount) -> Json:
    return {
        "source": str(mount.source),
        "target": mount.target,
        "read_only": mount.read_only,
    }


def _as_user(context: Json, pod: Json, image: Image) -> list[str]:
    """What lets a command be the user that it shall be, with what that user may do."""
    user = context.get("runAsUser", pod.get("runAsUser", image.user))
    group = context.get("runAsGroup", pod.get("runAsGroup", image.group))
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) and user == 0:
        raise PermissionError("container has runAsNonRoot and image will run as root")
    said = context.get("capabilities") or {}
    dropped = {each.lower() for each in said.get("drop") or ()}
    kept = [] if "all" in dropped else [e for e in RUNTIME_CAPABILITIES if e not in dropped]
    kept += [each.lower() for each in said.get("add") or ()]
    bounds = ",".join(["-all", *(f"+{each}" for each in dict.fromkeys(kept))])
    words = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    words += [f"--bounding-set={bounds}", "--inh-caps=-all"]
    if context.get("allowPrivilegeEscalation") is False:
        words.append("--no-new-privs")
    return [*words, "--"]
