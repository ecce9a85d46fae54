"""Addresses, and what is shown of the settings."""

from __future__ import annotations

import json

from sidecar.config import describe
from tests.support.settings import (
    STATIC,
    at,
    problems,
    with_policy,
)


def test_loopback_is_what_only_this_machine_can_reach() -> None:
    near = (
        "127.0.0.1:1",
        "127.9.9.9:0",
        "[::1]:1",
        "localhost:1",
        "LOCALHOST:1",
        "[127.0.0.1,::1]:1",
    )
    far = (
        "0.0.0.0:1",
        "[::]:1",
        "10.1.2.3:1",
        "localhost.example:1",
        "127.1:1",
        "h:65535",
        "[127.0.0.1,10.1.2.3]:1",
        "[::1,fd00::5]:1",
    )
    for text in near + far:
        found = with_policy(mode="http", listen=text).listen
        assert found
        assert (found.loopback, str(found)) == (text in near, text)


def test_an_address_has_to_name_a_host() -> None:
    for text in (
        ":15801",
        "15801",
        "::1",
        "a/b",
        "h:65536",
        "h:-1",
        "[x]:1",
        "h:1:2",
        "a b",
        "[]:1",
        "[::1,]:1",
        "[::1,h]:1",
        "::1,::2:1",
        "127.0.0.1,::1:1",
    ):
        [problem] = problems(mode="http", listen=text)
        assert problem == (
            "--listen: must be HOST:PORT that names its address, such as 127.0.0.1:15801 "
            f'(this machine) or 0.0.0.0:15801 (everybody), not "{text}"'
        )


def test_settings_can_be_shown_without_the_arguments_of_the_command() -> None:
    settings = with_policy(at("identity.static", STATIC), command=("x", "s3cret"))
    shown = json.dumps(describe(settings))
    assert "s3cret" not in shown
    assert describe(settings)["command"] == ["x", "…"]
    assert describe(settings)["opa"]["policy"] == "policies"
    assert '"id": "ann"' in shown
