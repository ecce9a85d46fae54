"""Metrics, from one source: Prometheus text for the admin port, OTLP for a collector.

`METRICS` is the table of what there is. Labels have few values: types and codes of ours, methods of
the table, and, bounded in number, tools that the server lists, reasons and owners of the policy and
codes of the server; the names of configured servers and issuers. No id, chain or session is ever a
label, and no URI that a peer has said.

Sources: OpenTelemetry, GenAI, "MCP" (`mcp.server.operation.duration`, its buckets and attributes);
"Prometheus and OpenMetrics Compatibility" (names in the Prometheus text).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from sidecar.conversation import Call
from sidecar.protocol.methods import REVISIONS
from sidecar.telemetry import attributes
from sidecar.telemetry.attributes import MAX_NAME, OTHER, Names

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Observation
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MAX_CODES = 50
_CODE = re.compile(r"[a-z_]{1,64}")

POLICY_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
MCP_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


Series = Iterable[tuple[Mapping[str, str], float]]
Reading = float | Series
"""What is observed: a value, or values by their labels."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One instrument."""

    name: str
    kind: Literal["counter", "histogram", "observed counter", "observed gauge"]
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_OPERATION = (
    "mcp.method.name",
    "mcp.protocol.version",
    "gen_ai.operation.name",
    "gen_ai.tool.name",
    "gen_ai.prompt.name",
    "error.type",
    "rpc.response.status_code",
    "network.transport",
    "network.protocol.name",
)

METRICS: tuple[Metric, ...] = (
    Metric(
        "authz.decisions",
        "counter",
        "{decision}",
        "Decisions, by policy or by the table of methods",
        (
            "actor.type",
            "authz.decision",
            "authz.reason",
            "authz.owner",
            "authz.mode",
            "gen_ai.tool.name",
        ),
    ),
    Metric(
        "authz.decision.duration",
        "histogram",
        "s",
        "Time until the policy's answer was there",
        ("actor.type", "authz.decision", "error.type"),
        POLICY_BUCKETS,
    ),
    Metric(
        "mcp.server.operation.duration",
        "histogram",
        "s",
        "Time of an MCP request or notification, from its arrival to its end",
        _OPERATION,
        MCP_BUCKETS,
    ),
    Metric(
        "mcp.client.operation.duration",
        "histogram",
        "s",
        "Time of an MCP request or notification that was let through, until its answer was there",
        (*_OPERATION, "server.address", "server.port"),
        MCP_BUCKETS,
    ),
    Metric(
        "authz.messages.malformed",
        "counter",
        "{message}",
        "Messages refused before they were anybody's action",
        ("error.type",),
    ),
    Metric("authz.spans.dropped", "observed counter", "{span}", "Spans that no collector took"),
    Metric(
        "authz.audit.failures",
        "observed counter",
        "{record}",
        "Audit records that could not be written",
    ),
    Metric("authz.calls.active", "observed gauge", "{call}", "Calls in flight"),
    Metric("authz.streams.active", "observed gauge", "{stream}", "Open streams and subscriptions"),
    Metric("authz.ready", "observed gauge", "{sidecar}", "1 when OPA decides by the right policy"),
    Metric("authz.opa.up", "observed gauge", "{opa}", "1 when OPA's last answer was a decision"),
    Metric(
        "authz.upstream.up",
        "observed gauge",
        "{server}",
        "1 when the server answered the last request that was let through",
        ("authz.server",),
    ),
    Metric(
        "authz.policy.info",
        "observed gauge",
        "{policy}",
        "1, for the policy that decides",
        ("authz.policy_revision",),
    ),
    Metric(
        "authz.policy.age",
        "observed gauge",
        "s",
        "Time since the sidecar first saw the revision of the policy that decides",
    ),
    Metric(
        "authz.policy.lagging",
        "observed gauge",
        "{policy}",
        "1 when a revision that should be in force was not within 5 s",
    ),
    Metric(
        "authz.catalog.tools",
        "observed gauge",
        "{tool}",
        "Tools that are known of a server",
        ("authz.server",),
    ),
    Metric(
        "authz.catalog.complete",
        "observed gauge",
        "{catalog}",
        "1 when a server's tools have been listed to the end",
        ("authz.server",),
    ),
    Metric(
        "authz.catalog.pins",
        "observed gauge",
        "{pin}",
        "Tools that are pinned, where there are pins",
        ("authz.server",),
    ),
    Metric(
        "authz.arguments.unchecked",
        "observed counter",
        "{call}",
        "Calls whose arguments could not be held against the tool's schema",
    ),
    Metric(
        "authz.keys.refreshes",
        "observed counter",
        "{refresh}",
        "Times that an issuer was asked for its keys",
        ("authz.issuer", "authz.result"),
    ),
    Metric(
        "authz.keys.age",
        "observed gauge",
        "s",
        "Time since an issuer last said that these are its keys",
        ("authz.issuer",),
    ),
    Metric("authz.tools.unpinned", "observed gauge", "{tool}", "Listed tools that are not pinned"),
)

_BY_NAME = {each.name: each for each in METRICS}


class Metrics:
    """The instruments, and the calls that they count."""

    def __init__(
        self, resource: Resource, version: str, *, pushed: MetricReader | None, scraped: bool
    ) -> None:
        from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider

        self._names, self._reasons, self._owners = Names(), Names(), Names()
        self._codes = Names(MAX_CODES)
        self._render: Callable[[], bytes] | None = None
        readers: list[MetricReader] = [] if pushed is None else [pushed]
        if scraped:
            reader, self._render = _prometheus()
            readers.append(reader)
        self._provider = MeterProvider(
            readers,
            resource,
            AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )
        self._meter = self._provider.get_meter("sidecar", version)
        self._decisions = self._counter("authz.decisions")
        self._malformed = self._counter("authz.messages.malformed")
        self._decision_time = self._histogram("authz.decision.duration")
        self._operation_time = self._histogram("mcp.server.operation.duration")
        self._upstream_time = self._histogram("mcp.client.operation.duration")
        self._up: dict[str, bool] = {}
        self.observe("authz.upstream.up", self._upstreams)

    def record(self, call: Call) -> None:
        """Count a finished call."""
        if call.decision is not None or call.error is not None or call.verdict != "allow":
            self._decisions.add(1, _present(self._decision_labels(call)))
        if call.asked:
            waited = _seconds(call.asked, call.answered)
            self._decision_time.record(waited, _present(_decision_time_labels(call)))
        taken = _seconds(call.received, call.finished)
        self._operation_time.record(taken, _present(self._operation_labels(call)))
        if call.forwarded:
            waited = _seconds(*attributes.upstream_times(call))
            self._upstream_time.record(waited, _present(self._upstream_labels(call)))
        if (up := attributes.answered(call)) is not None:
            self._up[call.server] = up

    def malformed(self, code: str) -> None:
        """Count a message that was refused before it was an action."""
        self._malformed.add(1, {"error.type": code})

    def observe(self, name: str, read: Callable[[], Reading]) -> None:
        """Read an observed instrument's value whenever metrics are collected."""
        row = _BY_NAME[name]
        make = (
            self._meter.create_observable_counter
            if row.kind == "observed counter"
            else self._meter.create_observable_gauge
        )
        make(row.name, [partial(_observations, row, read)], row.unit, row.description)

    def render(self) -> bytes:
        """The Prometheus text; empty when nobody is to scrape it."""
        return b"" if self._render is None else self._render()

    def shutdown(self) -> None:
        """Push what was counted since the last time."""
        self._provider.shutdown()

    def _counter(self, name: str) -> Counter:
        row = _BY_NAME[name]
        return self._meter.create_counter(row.name, row.unit, row.description)

    def _histogram(self, name: str) -> Histogram:
        row = _BY_NAME[name]
        return self._meter.create_histogram(
            row.name,
            row.unit,
            row.description,
            explicit_bucket_boundaries_advisory=row.buckets,
        )

    def _decision_labels(self, call: Call) -> dict[str, str | int | None]:
        return {
            "actor.type": call.actor.principal.type,
            "authz.decision": call.verdict,
            "authz.reason": self._reason(call),
            "authz.owner": self._owner(call),
            "authz.mode": call.mode,
            "gen_ai.tool.name": self._names.tool(call),
        }

    def _operation_labels(self, call: Call) -> dict[str, str | int | None]:
        return {
            **self._shared_labels(call),
            "error.type": self._code(attributes.server_error(call)),
            "rpc.response.status_code": self._code(attributes.status_code(call)),
            "network.transport": attributes.asker_transport(call),
            "network.protocol.name": attributes.asker_protocol(call),
        }

    def _upstream_labels(self, call: Call) -> dict[str, str | int | None]:
        return {
            **self._shared_labels(call),
            "error.type": self._code(attributes.upstream_error(call)),
            "rpc.response.status_code": self._code(attributes.upstream_code(call)),
            "network.transport": attributes.asked_transport(call),
            "network.protocol.name": attributes.asked_protocol(call),
            "server.address": attributes.server_host(call),
            "server.port": attributes.server_port(call),
        }

    def _shared_labels(self, call: Call) -> dict[str, str | int | None]:
        version = call.operation.protocol_version
        return {
            "mcp.method.name": attributes.method(call),
            "mcp.protocol.version": version if version is None or version in REVISIONS else OTHER,
            "gen_ai.operation.name": attributes.execute_tool(call),
            "gen_ai.tool.name": self._names.tool(call),
            "gen_ai.prompt.name": self._names.prompt(call),
        }

    def _upstreams(self) -> Series:
        return [({"authz.server": name}, up) for name, up in self._up.items()]

    def _reason(self, call: Call) -> str | None:
        code = attributes.reason(call)
        if code is None:
            return None
        return self._reasons.bound(code) if _CODE.fullmatch(code) else OTHER

    def _owner(self, call: Call) -> str | None:
        owner = None if call.decision is None else call.decision.owner
        return None if owner is None else self._owners.bound(attributes.text(owner))

    def _code(self, code: str | None) -> str | None:
        return None if code is None else self._codes.bound(code)


def _decision_time_labels(call: Call) -> dict[str, str | int | None]:
    return {
        "actor.type": call.actor.principal.type,
        "authz.decision": call.verdict,
        "error.type": attributes.policy_error(call),
    }


def _prometheus() -> tuple[MetricReader, Callable[[], bytes]]:
    """A reader with a registry of its own: the global one is anybody's."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
    return reader, partial(generate_latest, registry)


def _observations(
    row: Metric, read: Callable[[], Reading], _: CallbackOptions
) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    found = read()
    for labels, value in [({}, found)] if isinstance(found, int | float) else found:
        kept = {
            name: attributes.text(labels[name][:MAX_NAME]) for name in row.labels if name in labels
        }
        yield Observation(float(value), kept)


def _present(labels: Mapping[str, str | int | None]) -> dict[str, str | int]:
    return {name: value for name, value in labels.items() if value is not None}


def _seconds(start: int, end: int) -> float:
    return max(0, end - start) / 1e9
