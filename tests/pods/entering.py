"""Makes the file system that a container sees, and becomes its command. Run by `container`.

    python -I entering.py '{"root": …, "mounts": […], "read_only": …, "command": […]}'

It is given namespaces of its own for mounts and processes. What the container does not mount is not
there: the old root is gone before the command begins.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

RDONLY, REMOUNT, BIND, DETACH = 1, 32, 4096, 2
DEVICES = "null", "zero", "full", "random", "urandom"

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    said = json.loads(sys.argv[1])
    root = Path(said["root"])
    _mount("tmpfs", root, "tmpfs", 0, "mode=0755")
    for each in said["mounts"]:
        _place(root, each)
    for name, target in said["links"].items():
        (root / name).symlink_to(target)
    for folder in ("tmp", "run", "proc", "dev"):
        (root / folder).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    _mount("proc", root / "proc", "proc", 0)
    for name in DEVICES:
        _bind(Path("/dev", name), root / "dev" / name)
    _turn(root)
    if said["read_only"]:
        _mount("tmpfs", Path("/"), None, REMOUNT | BIND | RDONLY)
    command = said["command"]
    os.write(said["entered"], b".")
    os.close(said["entered"])
    os.execvpe(command[0], command, os.environ)


def _place(root: Path, mount: dict[str, Any]) -> None:
    target = root / mount["target"].lstrip("/")
    if "lower" in mount:
        target.mkdir(parents=True, exist_ok=True)
        _mount("overlay", target, "overlay", RDONLY, f"lowerdir={':'.join(mount['lower'])}")
        return
    _bind(Path(mount["source"]), target)
    if mount["read_only"]:
        _mount("none", target, None, REMOUNT | BIND | RDONLY)


def _bind(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(str(source), target, None, BIND)


def _turn(root: Path) -> None:
    """Put `root` in the place of everything."""
    (root / ".before").mkdir()
    os.chdir(root)
    _checked(_libc.pivot_root(b".", b".before"), "pivot_root")
    os.chdir("/")
    _checked(_libc.umount2(b"/.before", DETACH), "umount")
    Path("/.before").rmdir()


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    words = (source.encode(), bytes(target), kind.encode() if kind else None)
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def _checked(code: int, what: str) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
