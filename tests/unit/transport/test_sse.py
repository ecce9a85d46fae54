"""Whose session a POST leads into: only its owner's, and only by its token."""

from __future__ import annotations

from typing import Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request

from sidecar.config import Limits
from sidecar.conversation import Conversation, Server
from sidecar.errors import ProtocolError
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from sidecar.transport.exchange import Sessions
from sidecar.transport.sse import SseRelay

ANA, BOB = ("static|ana",), ("static|bob",)
CHAIN = ("static|bot", "static|ana")


def relay(*, live: bool = True) -> SseRelay:
    """With a session `t` of Ana's."""
    sessions, nobody = Sessions(10), cast("Any", None)
    conversation = Conversation(Session(MethodTable.of()), Server("x"), "http")
    sessions.open("t", conversation, ANA)
    made = SseRelay(nobody, nobody, sessions, Limits())
    if live:
        made._live["t"] = nobody
    return made


def test_its_owner_is_answered_in_it() -> None:
    request = make_mocked_request("POST", "/sse?session_id=t")
    relay().replier(request, ANA)
    assert relay().session_id(request, modern=True) == "t"


@pytest.mark.parametrize(
    ("target", "owner", "live"),
    [
        pytest.param("/sse?session_id=t", BOB, True, id="somebody else"),
        pytest.param("/sse?session_id=t", CHAIN, True, id="an agent of its owner"),
        pytest.param("/sse?session_id=t", (), True, id="nobody"),
        pytest.param("/sse?session_id=t", ANA, False, id="its stream is gone"),
        pytest.param("/sse?session_id=T", ANA, True, id="another token"),
        pytest.param("/sse?session_id=t&session_id=t", ANA, True, id="two tokens"),
        pytest.param("/sse?session_id=", ANA, True, id="an empty one"),
        pytest.param("/sse", ANA, True, id="none"),
    ],
)
def test_nobody_else_finds_it(target: str, owner: tuple[str, ...], live: bool) -> None:
    with pytest.raises(ProtocolError) as caught:
        relay(live=live).replier(make_mocked_request("POST", target), owner)
    assert caught.value.status == 404


def test_a_stream_is_opened_outside_of_any_session() -> None:
    request = make_mocked_request("GET", "/sse?session_id=t", headers={"Mcp-Session-Id": "t"})
    assert relay().session_id(request, modern=False) is None
