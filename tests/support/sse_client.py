"""A client of the legacy HTTP+SSE transport that says what it likes, and reads event by event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse

from tests.support.raw import Answer, Object, Wire, post, read_event


@dataclass
class Client:
    """A client on its stream."""

    url: str
    stream: HTTPResponse
    wire: Wire

    @property
    def endpoint(self) -> str:
        """Where the sidecar wants to have the messages of this session."""
        name, data = read_event(self.stream).split(b"\n")[:2]
        assert name == b"event: endpoint"
        return data.removeprefix(b"data: ").decode()

    def message(self) -> Object:
        """The next message."""
        lines = read_event(self.stream).splitlines()
        data = [each.removeprefix(b"data: ") for each in lines if each.startswith(b"data: ")]
        return dict(json.loads(b"\n".join(data)))


@dataclass
class Session:
    """A client in its session."""

    client: Client
    endpoint: str

    def post(self, body: object, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
        return post(self.client.url, body, headers, target=self.endpoint)

    def ask(self, message: Object) -> Object:
        """POST a request; its answer from the stream."""
        assert self.post(message).status == 202
        answer = self.client.message()
        assert answer["id"] == message["id"]
        return answer


@contextmanager
def listening(url: str, *headers: tuple[str, str]) -> Iterator[Client]:
    with Wire(url) as wire:
        wire.request(headers=(("Accept", "text/event-stream"), *headers), verb="GET")
        yield Client(url, wire.begin("GET"), wire)
        wire.hang_up()


@contextmanager
def session(url: str) -> Iterator[Session]:
    with listening(url) as client:
        assert client.stream.status == 200
        yield Session(client, client.endpoint)
