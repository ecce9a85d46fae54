"""Sessions belong to those who opened them."""

from __future__ import annotations

from sidecar.conversation import Conversation, Server
from sidecar.protocol.methods import MethodTable
from sidecar.protocol.session import Session
from sidecar.transport.exchange import Sessions

ANA, BOB = ("static|ana",), ("static|bob",)


def conversation() -> Conversation:
    return Conversation(Session(MethodTable.of()), Server("desk"), "http", lasting=False)


def test_a_session_is_found_by_its_id_and_owner() -> None:
    sessions, opened = Sessions(10), conversation()
    sessions.open("s", opened, ANA)
    assert sessions.find("s", ANA) is opened
    assert (opened.lasting, opened.session.id) == (True, "s")


def test_somebody_elses_session_is_not_there() -> None:
    sessions = Sessions(10)
    sessions.open("s", conversation(), ANA)
    assert sessions.find("s", BOB) is None
    assert sessions.find("s", ()) is None


def test_an_unknown_session_is_not_there_for_anybody() -> None:
    assert Sessions(10).find("s", ANA) is None
    assert Sessions(10).find("s", ()) is None


def test_a_forgotten_session_is_gone() -> None:
    sessions, opened = Sessions(10), conversation()
    sessions.open("s", opened, ANA)
    sessions.forget(opened)
    assert sessions.find("s", ANA) is None


def test_the_oldest_session_makes_room() -> None:
    sessions = Sessions(1)
    sessions.open("old", conversation(), ANA)
    sessions.open("new", conversation(), ANA)
    assert sessions.find("old", ANA) is None
    assert sessions.find("new", ANA) is not None


def test_whoever_makes_room_is_named_so_that_its_calls_can_end() -> None:
    sessions, first, second, third = Sessions(1), conversation(), conversation(), conversation()
    assert sessions.open("a", first, ANA) is None
    assert sessions.open("a", second, ANA) is first
    assert sessions.open("b", third, ANA) is second
    assert list(sessions) == [third]
