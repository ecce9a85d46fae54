"""The admission controllers, served to the API server over TLS.

Nothing here has a side effect: what a dry run is asked is answered alike.
"""

from __future__ import annotations

import logging
import ssl
from collections import Counter

from aiohttp import web

from sidecar.errors import MalformedMessage
from sidecar.injector.admission import HALVES, Unreadable, review
from sidecar.injector.injection import Injection
from sidecar.protocol.jsonrpc import parse_json

log = logging.getLogger("sidecar.injector")

MAX_BODY = 8 * 1024 * 1024
"""Bytes of a review, which has the pod twice; etcd keeps no object above 1.5 MiB."""

SCOPES = {"pod": False, "namespace": True}
"""By what the API server has selected: the pod's own label, or its namespace's."""


class Reviews:
    """Answers reviews, and counts the answers."""

    def __init__(self, injection: Injection) -> None:
        self._injection = injection
        self.counts: Counter[tuple[str, str]] = Counter()

    async def answer(self, request: web.Request) -> web.Response:
        """`POST /mutate/…` and `/validate/…`; the API server adds a query, which says nothing."""
        half, scope = request.match_info["half"], request.match_info["scope"]
        try:
            body = parse_json(await request.read())
            found, answer = review(body, half, SCOPES[scope], self._injection)
        except (MalformedMessage, Unreadable) as error:
            self.counts[half, "unreadable"] += 1
            return web.Response(status=400, text=f"{error}\n")
        self.counts[half, answer.outcome] += 1
        if answer.reason:
            log.info("%s: %s: %s", half, answer.outcome, answer.reason)
        return web.json_response(found)

    def metrics(self) -> str:
        """The counts as Prometheus text."""
        lines = ["# TYPE injector_reviews_total counter"]
        for (half, outcome), count in sorted(self.counts.items()):
            lines.append(f'injector_reviews_total{{webhook="{half}",outcome="{outcome}"}} {count}')
        return "\n".join(lines) + "\n"


async def serve_webhook(
    reviews: Reviews, host: str, port: int, context: ssl.SSLContext
) -> tuple[web.AppRunner, tuple[str, int]]:
    """Serve reviews; the runner to be cleaned up, and the bound address.

    Raises:
        OSError: the address can not be had.
    """
    halves, scopes = "|".join(HALVES), "|".join(SCOPES)
    application = web.Application(client_max_size=MAX_BODY)
    application.router.add_post(f"/{{half:{halves}}}/{{scope:{scopes}}}", reviews.answer)
    return await _serve(application, host, port, context)


async def serve_health(
    reviews: Reviews, host: str, port: int
) -> tuple[web.AppRunner, tuple[str, int]]:
    """Serve `/healthz` and `/metrics` in plain text.

    Raises:
        OSError: the address can not be had.
    """

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=reviews.metrics())

    application = web.Application(client_max_size=0)
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/metrics", metrics)
    return await _serve(application, host, port, None)


async def _serve(
    application: web.Application, host: str, port: int, context: ssl.SSLContext | None
) -> tuple[web.AppRunner, tuple[str, int]]:
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=5.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=context).start()
    except BaseException:
        await runner.cleanup()
        raise
    found = runner.addresses[0]
    return runner, (found[0], found[1])
