"""Lets in what the sidecar has signed for, and nothing else: middleware for a server in Python."""

import hashlib
from contextlib import suppress
from typing import Any

import jwt
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALGORITHMS = ["ES256", "EdDSA", "PS256"]


class OnlyBySidecar:
    def __init__(self, app: ASGIApp, audience: str, keys: list[bytes]) -> None:
        self.app, self.audience, self.keys = app, audience, keys

    def verified(self, token: str) -> dict[str, Any]:
        for key in self.keys:  # public ones, in PEM; two of them while they rotate
            with suppress(jwt.PyJWTError):
                return jwt.decode(token, key, ALGORITHMS, audience=self.audience, leeway=5)
        return {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        said = self.verified(request.headers.get("MCP-Sidecar-Assertion", ""))
        body = await request.body() if said else b""
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        if (said.get("htm"), said.get("digest")) != (request.method, digest):
            return await Response("only by the sidecar", 403)(scope, receive, send)
        read = iter([{"type": "http.request", "body": body}])

        async def again() -> Message:
            return next(read, None) or await receive()

        return await self.app(scope, again, send)
