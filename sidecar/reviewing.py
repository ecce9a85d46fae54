"""Asking a cluster's API server about tokens: each token once at a time, and not too many.

Whoever can reach the sidecar can make it ask, with tokens that look right and are made up. So a
token is looked at first, only so many reviews go on at once and begin in a second, and what the
server said is remembered for a short while. When it can not be asked, nobody is let in by it, and
that is said in other words than of a bad token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import cast

from sidecar.api_server import ApiServer, Unreachable
from sidecar.errors import RefusalCode, Unauthenticated
from sidecar.policy import reviews, tokens
from sidecar.policy.issuers import Issuer, Review
from sidecar.policy.tokens import Token, Unverified
from sidecar.protocol.jsonrpc import dump_json
from sidecar.protocol.session import Bounded

logger = logging.getLogger("sidecar.keys")

Clock = Callable[[], float]
Post = Callable[[bytes], Awaitable[bytes]]
"""Puts a review to the API server; raises `Unreachable`."""

MAX_ANSWER = 256 * 1024
MAX_REFUSED = 1000


_REFUSED = {
    401: "it says 401: the sidecar's own token is not taken",
    403: "it says 403: the sidecar may not create tokenreviews (system:auth-delegator lets it)",
}


class Reviewer:
    """Has tokens of one issuer reviewed. A good one is remembered by whoever asked."""

    def __init__(
        self, issuer: Issuer, review: Review, now: Clock, post: Post | None = None
    ) -> None:
        self._issuer, self._review, self._now = issuer, review, now
        authorities = None if review.ca is None else Path(review.ca)
        self._server = ApiServer(review.url, Path(review.token_file), authorities, MAX_ANSWER)
        self._post = post or self._posted
        self._room = asyncio.Semaphore(review.concurrent)
        self._going: dict[bytes, asyncio.Task[Token]] = {}
        self._refused: Bounded[bytes, tuple[float, RefusalCode, str]] = Bounded(MAX_REFUSED)
        self._second, self._begun = 0, 0
        self._failed = False

    async def review(self, text: str, unverified: Unverified, digest: bytes) -> Token:
        """The token, when the API server says that it is good; `digest` stands for its text.

        Raises:
            Unauthenticated: it is no good, or `review_unavailable`.
        """
        claimed = tokens.claimed(unverified, self._issuer, self._now())
        refused = self._refused.get(digest)
        if refused is not None and self.is_fresh(refused[0]):
            raise Unauthenticated(refused[1], refused[2])
        if (going := self._going.get(digest)) is None:
            # Held here until it is done, which is what the ban on `asyncio.create_task` is about.
            loop = asyncio.get_running_loop()
            going = loop.create_task(self._ask(text, claimed, digest), name="review")
            self._going[digest] = going
            going.add_done_callback(partial(self._done, digest))
        # Not awaited itself: one caller that gives up must not take it from the others.
        await asyncio.wait([going])
        return going.result()

    def is_fresh(self, since: float) -> bool:
        """Whether what was said then still counts; a clock that was set back has lost count."""
        return 0 <= self._now() - since < self._review.remember

    async def close(self) -> None:
        """End what goes on, and close the connections."""
        going = [*self._going.values()]
        for task in going:
            task.cancel()
        if going:
            await asyncio.wait(going)
        await self._server.close()

    def _done(self, digest: bytes, going: asyncio.Task[Token]) -> None:
        del self._going[digest]
        if not going.cancelled():
            going.exception()  # it is no loss when nobody waits for it any more

    async def _ask(self, text: str, claimed: Token, digest: bytes) -> Token:
        began = self._now()
        try:
            token = reviews.read(await self._answer(text), claimed)
        except Unreachable as error:  # why is for the log: callers learn nothing of the cluster
            self._fail(str(error))
            raise Unauthenticated("review_unavailable", "the cluster can not be asked") from error
        except Unauthenticated as error:
            if error.retryable:
                self._fail(str(error))
            else:
                code = cast("RefusalCode", error.code)
                self._refused.remember(digest, (began, code, str(error)))
            raise
        if self._failed:
            logger.info("reviews_work_again issuer=%s", self._issuer.name)
        self._failed = False
        return token

    async def _answer(self, text: str) -> bytes:
        body, limit = dump_json(reviews.question(text, self._issuer)), self._review.timeout
        try:
            async with asyncio.timeout(limit), self._room:
                self._count()
                return await self._post(body)
        except TimeoutError as error:
            raise Unreachable(f"it did not answer within {limit:g} s") from error

    async def _posted(self, body: bytes) -> bytes:
        status, answer = await self._server.send("POST", reviews.PATH, body)
        if status not in (200, 201):
            raise Unreachable(_REFUSED.get(status, f"it says {status}"))
        return answer

    def _count(self) -> None:
        second = int(self._now())
        if second != self._second:
            self._second, self._begun = second, 0
        self._begun += 1
        if self._begun > self._review.rate:
            raise Unreachable(f"there are more than {self._review.rate} reviews in a second")

    def _fail(self, why: str) -> None:
        if not self._failed:
            logger.warning("reviews_failed issuer=%s error=%s", self._issuer.name, why)
        self._failed = True
