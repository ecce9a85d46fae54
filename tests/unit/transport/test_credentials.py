"""Tokens from files and descriptors: read when they change, and never more than is theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.errors import ConfigError
from sidecar.transport.credentials import MAX_TOKEN, TokenFile, TokenPipe, fits_a_header


def test_a_file_is_read_again_when_it_is_another(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = TokenFile(path)
    assert token.current() is None
    path.write_text(" first \n", "ascii")
    assert [token.current(), token.current()] == ["first", "first"]
    other = tmp_path / "other"
    other.write_text("again\n", "ascii")
    other.rename(path)
    assert token.current() == "again"
    path.write_text("\n", "ascii")
    assert token.current() is None
    path.unlink()
    assert token.current() is None
    path.mkdir()
    assert token.current() is None


def test_a_file_behind_links_that_are_swapped(tmp_path: Path) -> None:
    """As Kubernetes rotates what it projects."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(name, "ascii")
    (tmp_path / "data").symlink_to("one")
    token = TokenFile(tmp_path / "data" / "token")
    assert token.current() == "one"
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").rename(tmp_path / "data")
    assert token.current() == "two"


def test_a_file_without_an_end_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"x" * 10 * MAX_TOKEN)
    found = TokenFile(path).current()
    assert found is not None
    assert MAX_TOKEN < len(found) < 2 * MAX_TOKEN  # too long, which is what it is refused for


def test_the_last_line_of_a_descriptor_counts() -> None:
    reading, writing = os.pipe()
    try:
        os.set_inheritable(reading, True)
        token = TokenPipe(reading)
        assert not os.get_inheritable(reading)
        found = [token.current()]
        for data in (b"fir", b"st\n", b"\n", b"second\nthird\nfou", b"rth"):
            os.write(writing, data)
            found.append(token.current())
        assert found == [None, None, "first", "first", "third", "third"]
    finally:
        os.close(writing)
    assert [token.current(), token.current()] == ["fourth", "fourth"]
    os.close(reading)


def test_a_line_without_an_end_is_not_kept() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    token = TokenPipe(reading)
    for _ in range(10):
        os.write(writing, b"x" * MAX_TOKEN)
        assert token.current() is None
    assert len(token._rest) <= MAX_TOKEN + 1
    os.close(writing)
    os.close(reading)


def test_a_descriptor_has_to_be_open() -> None:
    with pytest.raises(ConfigError, match=r"^identity\.token_fd: 99999 can not be read"):
        TokenPipe(99999)


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "a\x00", "é", "a" * (MAX_TOKEN + 1)])
def test_what_is_no_token_goes_into_no_header(token: str) -> None:
    assert not fits_a_header(token)
    assert fits_a_header("a.b-c_~+/==")
