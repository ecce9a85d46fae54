"""What the injector counts, as Prometheus text."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0)

OWNERS = frozenset({"ReplicaSet", "StatefulSet", "DaemonSet", "Job", "Pod"})
OPERATIONS = frozenset({"CREATE", "UPDATE"})
"""What has a series of its own: who writes pods may name any other kind."""


class Metrics:
    """Counters, each with labels of few values."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._reviews = Counter(
            "injector_reviews", "Reviews answered", ("webhook", "outcome"), registry=self._registry
        )
        self._refusals = Counter(
            "injector_refusals", "Pods refused, by what was asked for, and for whom",
            ("webhook", "operation", "owner"), registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "injector_review_seconds", "From a review's head to its answer",
            ("webhook",), buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._errors = Counter(
            "injector_cluster_errors", "Requests to the API server that came to nothing", ("what",),
            registry=self._registry,
        )  # fmt: skip
        self._events = Counter(
            "injector_events", "Events: sent, failed, dropped, or to be counted into the next",
            ("result",), registry=self._registry,
        )  # fmt: skip

    def reviewed(self, half: str, outcome: str, seconds: float) -> None:
        """A review was answered."""
        self._reviews.labels(half, outcome).inc()
        self._seconds.labels(half).observe(seconds)

    def refused(self, half: str, operation: str, owner: str) -> None:
        """A pod was refused."""
        did = operation if operation in OPERATIONS else "other"
        self._refusals.labels(half, did, owner if owner in OWNERS else "other").inc()

    def failed(self, what: str) -> None:
        """A request to the API server came to nothing."""
        self._errors.labels(what).inc()

    def event(self, result: str) -> None:
        """Something became of an Event."""
        self._events.labels(result).inc()

    def expires(self, when: Callable[[], float]) -> None:
        """Have `when` asked for the end of the certificate in use."""
        name = "injector_certificate_expiry_timestamp_seconds"
        gauge = Gauge(name, "When the certificate in use ends", registry=self._registry)
        gauge.set_function(when)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
