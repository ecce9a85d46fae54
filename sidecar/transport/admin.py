"""The admin port: is it alive, is it ready, what has it counted. Nothing that acts is here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from aiohttp import web

from sidecar.config import Listen
from sidecar.protocol.jsonrpc import JsonObject
from sidecar.transport.app_health import AppProbe, is_well

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def serve_admin(
    listen: Listen,
    readiness: Callable[[], JsonObject],
    metrics: Callable[[], bytes],
    probes: Mapping[str, AppProbe],
) -> tuple[web.AppRunner, list[Listen]]:
    """Serve `/livez`, `/readyz` and `/metrics`; the runner to be cleaned up, and the addresses.

    `readiness` gives the body of `/readyz`, whose `ready` makes it 200 or 503. `probes` are those
    of the server that are asked here, by their paths.

    Raises:
        OSError: an address can not be had.
    """

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        status = readiness()
        text = json.dumps(status, indent=2) + "\n"
        return web.Response(
            status=200 if status["ready"] else 503, text=text, content_type="application/json"
        )

    async def show_metrics(request: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": METRICS_TYPE})

    async def app_health(request: web.Request) -> web.Response:
        well = await is_well(probes[request.path])
        return web.Response(status=200 if well else 503, text="ok\n" if well else "not well\n")

    application = web.Application(client_max_size=0)
    for path in probes:
        application.router.add_get(path, app_health)
    application.router.add_get("/livez", livez)
    application.router.add_get("/readyz", readyz)
    application.router.add_get("/metrics", show_metrics)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    port = listen.port
    try:
        for host in listen.hosts:
            await web.TCPSite(runner, host, port).start()
            port = runner.addresses[0][1]
    except BaseException:
        await runner.cleanup()
        raise
    return runner, [Listen(*address[:2]) for address in runner.addresses]
