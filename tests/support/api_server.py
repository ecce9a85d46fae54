"""A cluster's API server, as far as TokenReview goes, and ways of answering badly.

It answers as `kube-apiserver` does: 201 and the whole object, where the status of a token that it
does not take has no `authenticated`. Errors are objects of kind `Status`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import jwt
from aiohttp import web

from tests.support.issuing import DROP

Mood = Literal["well", "silent", "redirecting", "huge", "failing", "babbling"]
OWN_TOKEN = "the-sidecars-own-token"
EXTRA = "authentication.kubernetes.io/"
PATH = "/apis/authentication.k8s.io/v1/tokenreviews"


class ApiServer:
    """What it takes for good: every token that it has not been told to `reject`.

    `changes` are made to what it says of the user; `asked` are the tokens that it was asked about.
    """

    def __init__(self) -> None:
        self.mood: Mood = "well"
        self.rejected: set[str] = set()
        self.changes: dict[str, Any] = {}
        self.audiences: list[str] | None = None
        self.asked: list[str] = []
        self.going = self.most = 0
        self.open = asyncio.Event()
        self.open.set()
        self.url = ""
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def start(self, trust: ssl.SSLContext | None = None) -> None:
        """Serve; after a stop at the same port again."""
        application = web.Application()
        application.router.add_post(PATH, self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, "127.0.0.1", self._port, ssl_context=trust, reuse_address=True
        )
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http{'s' if trust else ''}://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Be down."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {OWN_TOKEN}":
            return failure(401, "Unauthorized")
        review = json.loads(await request.read())
        self.asked.append(review["spec"]["token"])
        self.going += 1
        self.most = max(self.most, self.going)
        try:
            await self.open.wait()
            return await self._in_this_mood(review)
        finally:
            self.going -= 1

    async def _in_this_mood(self, review: dict[str, Any]) -> web.StreamResponse:
        match self.mood:
            case "silent":
                await asyncio.sleep(60)
            case "redirecting":
                raise web.HTTPTemporaryRedirect("/elsewhere")
            case "failing":
                return failure(403, "tokenreviews.authentication.k8s.io is forbidden")
            case "huge":
                return web.Response(body=b" " * 300_000, status=201)
            case "babbling":
                return web.Response(body=b"{}", status=201)
            case _:
                pass
        return web.json_response(self.reviewed(review), status=201)

    def reviewed(self, review: dict[str, Any]) -> dict[str, Any]:
        """The object that comes back."""
        spec = review["spec"]
        claims = jwt.decode(spec["token"], options={"verify_signature": False})
        shared = [each for each in claims["aud"] if each in spec["audiences"]]
        if spec["token"] in self.rejected or not shared:
            status = refused()
        else:
            status = taken(claims, shared if self.audiences is None else self.audiences)
            status["user"].update(self.changes)
        return {**review, "metadata": {"creationTimestamp": None}, "status": status}


def taken(claims: dict[str, Any], audiences: list[str]) -> dict[str, Any]:
    """The status of a good token with these claims."""
    bound = claims["kubernetes.io"]
    namespace = bound["namespace"]
    extra = {
        f"{EXTRA}{what}-{key}": [bound[what][key]]
        for what in ("node", "pod")
        for key in ("name", "uid")
        if what in bound
    }
    accounts = "system:serviceaccounts"
    user = {
        "username": claims["sub"],
        "uid": bound["serviceaccount"].get("uid", ""),
        "groups": [accounts, f"{accounts}:{namespace}", "system:authenticated"],
        "extra": {f"{EXTRA}credential-id": [f"JTI={claims['jti']}"], **extra},
    }
    return {"authenticated": True, "user": user, "audiences": audiences}


def refused() -> dict[str, Any]:
    """The status of a bad one."""
    return {"user": {}, "error": "[invalid bearer token, token lookup failed]"}


def changed(status: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The status with these members, or without those that are dropped."""
    return {name: value for name, value in {**status, **changes}.items() if value is not DROP}


def failure(code: int, message: str) -> web.Response:
    """An error of the API server's own."""
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return web.json_response({**status, "message": message, "code": code}, status=code)


@asynccontextmanager
async def api_server(trust: ssl.SSLContext | None = None) -> AsyncIterator[ApiServer]:
    """An API server, for as long as the test lasts."""
    server = ApiServer()
    await server.start(trust)
    try:
        yield server
    finally:
        server.open.set()
        await server.stop()
