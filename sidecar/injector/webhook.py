"""The admission controllers, served to the API server over TLS.

What is asked is answered from the question alone. Of a refusal others are told afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable

from aiohttp import web

from sidecar.errors import MalformedMessage
from sidecar.injector.admission import HALVES, Answer, Unreadable, review
from sidecar.injector.events import regarding
from sidecar.injector.injection import Injection, Json
from sidecar.injector.metrics import Metrics
from sidecar.protocol.jsonrpc import parse_json

log = logging.getLogger("sidecar.injector")

MAX_BODY = 8 * 1024 * 1024
"""Bytes of a review, which has the pod twice; etcd keeps no object above 1.5 MiB."""

PATIENCE = 3.0
"""Seconds for a review to arrive; the API server itself gives up after five."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SCOPES = {"pod": False, "namespace": True}
"""By what the API server has selected: the pod's own label, or its namespace's."""

Refused = Callable[[Json, Answer], None]
"""Is told of a request that was refused; it must neither wait nor fail."""


class Reviews:
    """Answers reviews, and counts the answers."""

    def __init__(
        self, injection: Injection, metrics: Metrics, refused: Refused | None = None
    ) -> None:
        self._injection, self.metrics, self._refused = injection, metrics, refused

    async def answer(self, request: web.Request) -> web.Response:
        """`POST /mutate/…` and `/validate/…`; the API server adds a query, which says nothing."""
        half, began = request.match_info["half"], time.perf_counter()
        outcome = "failed"
        try:
            outcome, response = await self._answered(request, half)
        except web.HTTPRequestEntityTooLarge:
            outcome = "unreadable"
            raise
        finally:
            self.metrics.reviewed(half, outcome, time.perf_counter() - began)
        return response

    async def _answered(self, request: web.Request, half: str) -> tuple[str, web.Response]:
        try:
            async with asyncio.timeout(PATIENCE):
                text = await request.read()
            body = parse_json(text)
            enabled = SCOPES[request.match_info["scope"]]
            found, answer = review(body, half, enabled, self._injection)
        except TimeoutError:
            return "late", web.Response(status=408, text="the review did not arrive in time\n")
        except (MalformedMessage, Unreadable) as error:
            return "unreadable", web.Response(status=400, text=f"{error}\n")
        if answer.reason:
            log.info("%s: %s: %s", half, answer.outcome, answer.reason)
        if not answer.allowed and isinstance(body, dict):
            self._say_refused(half, body["request"], answer)
        return answer.outcome, web.json_response(found)

    def _say_refused(self, half: str, request: Json, answer: Answer) -> None:
        about = regarding(request)
        self.metrics.refused(half, str(request.get("operation")), about["kind"])
        if self._refused is not None:
            self._refused(request, answer)


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
    metrics: Metrics, unready: Callable[[], str | None], host: str, port: int
) -> tuple[web.AppRunner, tuple[str, int]]:
    """Serve `/healthz`, `/readyz` and `/metrics` in plain text.

    Raises:
        OSError: the address can not be had.
    """

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        why = unready()
        return web.Response(status=503 if why else 200, text=f"{why or 'ok'}\n")

    async def counted(request: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    application = web.Application(client_max_size=0)
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/readyz", readyz)
    application.router.add_get("/metrics", counted)
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
