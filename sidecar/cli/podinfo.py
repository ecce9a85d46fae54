"""What the pod is, for the policy: fields of the configuration, and labels of the downward API.

The labels are a file that the kubelet keeps (`metadata.labels` of a `downwardAPI` volume): a line
`key="value"` each, the value quoted. The file is read again when it has changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidecar.config import Pod

log = logging.getLogger("sidecar")

MAX_FILE = 64 * 1024
MAX_LABELS = 256

# What Kubernetes takes for a label: none of it would be escaped within the quotes.
_LABEL = re.compile(r'((?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9._-]{1,63})="([A-Za-z0-9._-]{0,63})"')


def pod(settings: Pod) -> Callable[[], Mapping[str, Any]]:
    """What `context.pod` of the input document is at the moment; what is not known is not there."""
    fields = {
        "name": settings.name,
        "namespace": settings.namespace,
        "service_account": settings.service_account,
    }
    fixed = {key: value for key, value in fields.items() if value is not None}
    if settings.labels_file is None:
        return lambda: fixed
    labels = Labels(settings.labels_file)

    def current() -> Mapping[str, Any]:
        found = labels.current()
        return fixed if found is None else {**fixed, "labels": found}

    return current


class Labels:
    """The labels in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = ()
        self._labels: Mapping[str, str] | None = None

    def current(self) -> Mapping[str, str] | None:
        """What is in the file now; None when it can not be read."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen != self._seen:
                with self._path.open("rb") as file:
                    self._labels = read_labels(file.read(MAX_FILE + 1))
                self._seen = seen
        except OSError as error:
            if self._seen is not None:
                log.warning("pod.labels_file: %s: %s", self._path, error.strerror)
            self._seen = self._labels = None
        return self._labels


def read_labels(content: bytes) -> dict[str, str]:
    """The labels of a downward API file. What is no label is skipped, and said in the log."""
    lines = content[:MAX_FILE].decode("utf-8", "replace").split("\n")
    if len(content) > MAX_FILE:
        del lines[-1]  # it is not whole
        log.warning("pod.labels_file: only the first %d bytes are read", MAX_FILE)
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if len(labels) == MAX_LABELS:
            log.warning("pod.labels_file: only the first %d labels are read", MAX_LABELS)
            break
        if (label := _LABEL.fullmatch(line)) is None:
            log.warning("pod.labels_file: line %d is no label", number)
        else:
            labels.setdefault(label[1], label[2])
    return labels
