"""A real Jaeger, started from the configuration of `make jaeger`, and its own HTTP API."""

from __future__ import annotations

import base64
import json
import random
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.otlp import Span, read_spans
from tests.support.processes import ROOT, Process, alive, get, wait_until

CONFIGURATION = ROOT / ".ci" / "jaeger.yaml"
PORTS = {
    "JAEGER_HTTP_PORT": 16686,
    "JAEGER_GRPC_PORT": 16685,
    "JAEGER_OTLP_HTTP_PORT": 4318,
    "JAEGER_OTLP_GRPC_PORT": 4317,
}
IDS = ("traceId", "spanId", "parentSpanId")
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Jaeger:
    """A Jaeger that listens: `url` is where people and questions go, `otlp` where spans go."""

    url: str
    otlp: str

    @classmethod
    def at(cls, env: Mapping[str, str]) -> Jaeger:
        """The one of `make jaeger`, whose ports these variables may have moved."""
        ports = {name: env.get(name, usual) for name, usual in PORTS.items()}
        page, spans = ports["JAEGER_HTTP_PORT"], ports["JAEGER_OTLP_HTTP_PORT"]
        return cls(f"http://127.0.0.1:{page}", f"http://127.0.0.1:{spans}")

    @property
    def answers(self) -> bool:
        """Whether there is one at all."""
        with suppress(OSError):
            return get(f"{self.url}/api/v3/services")[0] == 200
        return False

    def search_page(self, service: str, tags: dict[str, str]) -> str:
        """Where people see the traces that `search` finds."""
        return f"{self.url}/search?{_query(service=service, tags=_compact(tags), lookback='1h')}"

    def search_api(self, service: str, tags: dict[str, str]) -> str:
        """The same as JSON, by whichever of its APIs can search by tags."""
        old = f"{self.url}/api/traces?{_query(service=service, tags=_compact(tags), limit=1000)}"
        status, body = get(old)
        if status == 200 and body.startswith(b"{"):
            return old
        # Gone in 2.21, where version 3 can.
        now = time.time()
        asked = {
            "query.serviceName": service,
            "query.attributes": _compact(tags),
            "query.startTimeMin": _rfc3339(now - HOUR),
            "query.startTimeMax": _rfc3339(now + HOUR),
            "query.searchDepth": 1000,
        }
        return f"{self.url}/api/v3/traces?{_query(**asked)}"

    def search(self, service: str, tags: dict[str, str]) -> set[str]:
        """The ids of the traces in which one span of the service has all these tags."""
        url = self.search_api(service, tags)
        if "/v3/" in url:
            return {span.trace_id for span in _spans(url)}
        return {str(trace["traceID"]) for trace in json.loads(get(url)[1])["data"]}

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace, in order of their start."""
        spans = _spans(f"{self.url}/api/v3/traces/{trace_id}")
        return sorted(spans, key=lambda span: span.start)

    def calls(self) -> set[tuple[str, str]]:
        """The service graph: who calls whom."""
        asked = _query(endTs=int((time.time() + HOUR) * 1000), lookback=int(2 * HOUR * 1000))
        _, body = get(f"{self.url}/api/dependencies?{asked}")
        return {(link["parent"], link["child"]) for link in json.loads(body)["data"]}


@contextmanager
def jaeger(binary: Path | str, env: Mapping[str, str]) -> Iterator[Jaeger]:
    """A Jaeger of its own, on the ports of the loopback that the environment says."""
    started = Jaeger.at(env)
    with Process((binary, "--config", CONFIGURATION), env=env) as process:

        def ready() -> bool:
            assert alive(process.pid), f"{process} ended:\n{process.tail()}"
            return started.answers

        wait_until(ready, f"{process} answers")
        yield started


def elsewhere() -> dict[str, str]:
    """Variables that move a Jaeger to free ports: left to choose, it would not say which it took.

    They are none that outgoing connections may get meanwhile.
    """
    ports = filter(_free, random.sample(range(20_000, 30_000), 100))
    return {name: str(port) for name, port in zip(PORTS, ports, strict=False)}


def _free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def _spans(url: str) -> list[Span]:
    status, body = get(url)
    if status == 404:  # its way to say that there are none
        return []
    assert status == 200, body
    export = _with_bytes(json.loads(body)["result"])
    return read_spans(ParseDict(export, ExportTraceServiceRequest(), ignore_unknown_fields=True))


def _query(**fields: object) -> str:
    return urlencode(fields)


def _compact(tags: dict[str, str]) -> str:
    return json.dumps(tags, separators=(",", ":"))


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _with_bytes(value: Any) -> Any:
    """OTLP has ids as hex in JSON, where protobuf's own JSON has base64."""
    if isinstance(value, list):
        return [_with_bytes(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: base64.b64encode(bytes.fromhex(each)).decode() if name in IDS else _with_bytes(each)
        for name, each in value.items()
    }
