"""What the pod's labels are, whatever stands in their file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.cli.podinfo import MAX_FILE, MAX_LABELS, pod, read_labels
from sidecar.config import Pod
from sidecar.protocol.jsonrpc import dump_json

GOOD = b'app="tickets"\napp.kubernetes.io/name="desk"\nempty=""\n'


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        pytest.param(GOOD, {"app": "tickets", "app.kubernetes.io/name": "desk", "empty": ""}),
        pytest.param(b"", {}, id="none"),
        pytest.param(b'a="1"', {"a": "1"}, id="without the last line's end"),
        pytest.param(b'a="1"\na="2"', {"a": "1"}, id="twice: the first"),
        pytest.param(b'a="' + b"v" * 63 + b'"', {"a": "v" * 63}, id="longest value"),
        pytest.param(b'a="1"\n' * 3 + b"x" * MAX_FILE, {"a": "1"}, id="too large"),
        pytest.param(
            b"".join(b'l%d="v"\n' % n for n in range(MAX_LABELS + 1)),
            {f"l{n}": "v" for n in range(MAX_LABELS)},
            id="too many",
        ),
    ],
)
def test_a_label_is_a_line(content: bytes, labels: dict[str, str]) -> None:
    assert read_labels(content) == labels


@pytest.mark.parametrize(
    "line",
    [
        b"a=1",
        b'a="1',
        b'a="1"x',
        b'="1"',
        b'a = "1"',
        b'a="\\""',
        b'a="\\ud800"',
        b'a="\xff"',
        b'a="1"\r',
        b'a/b/c="1"',
        b'a="' + b"v" * 64 + b'"',
        b"k" * 64 + b'="1"',
    ],
)
def test_what_is_no_label_is_said_and_skipped(
    line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_labels(b'x="1"\n' + line + b'\ny="2"\n') == {"x": "1", "y": "2"}
    assert caplog.messages == ["pod.labels_file: line 2 is no label"]


@given(st.binary(max_size=2000))
def test_whatever_is_read_can_be_asked_with(content: bytes) -> None:
    logging.disable()
    try:
        labels = read_labels(content)
    finally:
        logging.disable(logging.NOTSET)
    assert len(labels) <= MAX_LABELS
    assert dump_json(dict(labels)).isascii()


def test_the_file_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the kubelet does it: a link to another file takes the place of the last one."""
    link = tmp_path / "labels"
    current = pod(Pod(name="p1", labels_file=link))
    assert current() == current() == {"name": "p1"}
    assert len(caplog.messages) == 1
    for n, content in enumerate((b'tier="1"\n', b'tier="2"\n')):
        file, new = tmp_path / f"file{n}", tmp_path / f"link{n}"
        file.write_bytes(content)
        new.symlink_to(file)
        new.rename(link)
        assert current() == {"name": "p1", "labels": {"tier": f"{n + 1}"}}
    link.unlink()
    assert current() == {"name": "p1"}


def test_without_a_file_there_are_the_configured_fields() -> None:
    assert pod(Pod(name="p1", service_account="a"))() == {"name": "p1", "service_account": "a"}
    assert pod(Pod())() == {}
