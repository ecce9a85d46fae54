"""Volumes as a kubelet makes them: folders on this machine that containers mount."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path

WORLD = 0o1777
"""An emptyDir is everybody's who mounts it."""


def empty_dir(folder: Path) -> Path:
    """A folder that everybody may write to."""
    folder.mkdir(parents=True)
    folder.chmod(WORLD)
    return folder


class Payload:
    """Files that are changed all at once, as the kubelet's atomic writer does it.

    Each file is a link into `..data`, which is a link to the folder of one payload: that link is
    renamed over the old one. What is no longer there loses its own link afterwards.

    Source: Kubernetes, pkg/volume/util/atomic_writer.go, `AtomicWriter.Write`.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], mode: int = 0o644) -> None:
        self.folder, self._mode, self._numbers = folder, mode, count(1)
        folder.mkdir(parents=True)
        folder.chmod(WORLD)
        self.write(files)

    def write(self, files: Mapping[str, str]) -> None:
        """Put other files in the place of those that are there."""
        data, old = self.folder / "..data", self._current()
        made = self.folder / f"..2026_11_22_10_15_00.{next(self._numbers)}"
        made.mkdir(mode=0o755)
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
            (made / name).chmod(self._mode)
        fresh = self.folder / "..data_tmp"
        fresh.symlink_to(made.name)
        fresh.rename(data)
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(Path("..data", name))
        for each in self.folder.iterdir():
            if not each.name.startswith("..") and each.name not in files:
                each.unlink()
        if old is not None:
            shutil.rmtree(old)

    def _current(self) -> Path | None:
        data = self.folder / "..data"
        return self.folder / data.readlink() if data.is_symlink() else None


def labels_file(labels: Mapping[str, str]) -> str:
    """`metadata.labels` as the downward API writes it."""
    return "\n".join(f'{key}="{value}"' for key, value in sorted(labels.items()))


def token_for(audience: str) -> str:
    """What stands for the token of the pod's account."""
    return f"token-of-the-pod.for.{audience}"
