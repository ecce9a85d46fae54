"""Keys of issuers, fetched and kept; and tokens verified with them.

A call whose key is known never waits. A key id that is not known asks the issuer again, once for
everybody who waits and not more often than `KeySource.interval`, so that made-up ids drive nothing.
Keys are refreshed behind the calls that use them, once they are older than `max_age`, and stay good
for `stale` while the issuer does not answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from sidecar.errors import KeysUnusable, MalformedMessage, Unauthenticated
from sidecar.policy import jwks, tokens
from sidecar.policy.issuers import Issuer, KeySource, fetchable, same_origin
from sidecar.policy.jwks import PublicKey
from sidecar.policy.tokens import Token, Unverified
from sidecar.protocol.jsonrpc import FROM_SERVER, JsonObject, parse_json
from sidecar.reviewing import Post, Reviewer

logger = logging.getLogger("sidecar.keys")

Fetch = Callable[[KeySource, str], Awaitable[bytes]]
Clock = Callable[[], float]

MAX_VERIFIED = 2000
_FILE_LOOK = 1.0  # seconds between looks at a key file
_DISCOVERY = "/.well-known/openid-configuration"


@dataclass(slots=True)
class Refreshes:
    """How the keys of one issuer were refreshed; `problem` is why the last time failed."""

    successes: int = 0
    failures: int = 0
    problem: str | None = None


class IssuerKeys:
    """The keys of one issuer. `fetch` gets a URL, and `now` is Unix time."""

    def __init__(self, issuer: Issuer, fetch: Fetch, now: Clock) -> None:
        self._issuer, self._source = issuer, issuer.keys
        self._fetch, self._now = fetch, now
        self._keys: tuple[PublicKey, ...] = ()
        self._fetched: float | None = None
        self._tried: float | None = None
        self.refreshes = Refreshes()
        self._file: tuple[int, ...] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def find(self, token: Unverified) -> PublicKey:
        """The key that a token names.

        Raises:
            Unauthenticated: `token_key_unknown`, `token_algorithm`, `keys_unavailable`.
        """
        key = jwks.select(self.current(), token.key_id, token.algorithm)
        if key is None:
            await self._refreshed()
            key = jwks.select(self.current(), token.key_id, token.algorithm)
        if key is not None:
            return key
        if not self._good():
            raise Unauthenticated("keys_unavailable", "the issuer's keys can not be had")
        raise Unauthenticated("token_key_unknown", "the issuer has no such key")

    def current(self) -> tuple[PublicKey, ...]:
        """The keys that are good now; a refresh that is due begins, and nobody waits for it."""
        age = self._source.max_age if self._source.file is None else _FILE_LOOK
        if _over(self._fetched, age, self._now()):
            self._refresh()
        return self._keys if self._good() else ()

    @property
    def age(self) -> float | None:
        """Seconds since the issuer last said that these are its keys; None before it has."""
        return None if self._fetched is None else max(0.0, self._now() - self._fetched)

    async def warm(self) -> None:
        """Have the keys before the first token wants them; without them it will ask again."""
        await self._refreshed()

    async def close(self) -> None:
        """End a fetch that is going on."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    def _good(self) -> bool:
        return bool(self._keys) and not _over(self._fetched, self._source.stale, self._now())

    async def _refreshed(self) -> None:
        """Wait for the fetch that goes on, or for a new one if it is time for one."""
        self._refresh()
        if self._refreshing is not None and not self._refreshing.done():
            # Not awaited itself: one caller that gives up must not take it from the others.
            await asyncio.wait([self._refreshing])

    def _refresh(self) -> None:
        """Begin a fetch, unless one goes on or the last one was a moment ago."""
        if self._refreshing is not None and not self._refreshing.done():
            return
        if self._source.file is not None:
            self._read_file(self._source.file)
            return
        failed = self.refreshes.problem is not None
        pause = self._source.retry if failed else self._source.interval
        if _over(self._tried, pause, self._now()):
            self._tried = self._now()
            # Held here until `close`, which is what the ban on `asyncio.create_task` is about.
            loop = asyncio.get_running_loop()
            self._refreshing = loop.create_task(self._fetch_all(), name="keys")

    async def _fetch_all(self) -> None:
        try:
            url = self._source.url or await self._discovered()
            self._take(await self._fetch(self._source, url))
        except (KeysUnusable, MalformedMessage) as error:
            self._fail(str(error))
        except Exception as error:
            self._failed(type(error).__name__)
            logger.exception("keys_refresh_failed issuer=%s", self._issuer.name)

    async def _discovered(self) -> str:
        """The key set's URL as the issuer publishes it (OIDC Discovery §4), on its own server."""
        name = self._issuer.name
        document = _object(await self._fetch(self._source, name.rstrip("/") + _DISCOVERY))
        url = document.get("jwks_uri")
        if document.get("issuer") != name:
            raise KeysUnusable("the discovery document is another issuer's")
        if not isinstance(url, str) or not fetchable(url, insecure=self._source.insecure):
            raise KeysUnusable("the discovery document names no key set that may be fetched")
        if not same_origin(url, name):
            raise KeysUnusable("the key set is on another server: configure its url")
        return url

    def _read_file(self, name: str) -> None:
        """Read a key file that is another than the last one; what can not be read changes nothing.

        A file that stays is as good as new: `stale` is about issuers that can not be asked.
        """
        path = Path(name)
        try:
            stat = path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen != self._file:
                self._file = seen
                if stat.st_size > self._source.max_size:
                    raise KeysUnusable(f"the file has more than {self._source.max_size} bytes")
                self._take(path.read_bytes())
            self._fetched = self._now()
        except (KeysUnusable, MalformedMessage, OSError) as error:
            self._fail(str(error))

    def _take(self, content: bytes) -> None:
        """Replace the keys: one that the issuer has withdrawn is gone."""
        keys = jwks.read_keys(content)
        if not keys:
            raise KeysUnusable("the key set has no key that can verify")
        if keys != self._keys or self.refreshes.problem is not None:
            logger.info("keys_refreshed issuer=%s keys=%d", self._issuer.name, len(keys))
        self._keys, self._fetched = keys, self._now()
        self.refreshes.successes += 1
        self.refreshes.problem = None

    def _fail(self, why: str) -> None:
        if self.refreshes.problem is None:
            logger.warning("keys_refresh_failed issuer=%s error=%s", self._issuer.name, why)
        self._failed(why)

    def _failed(self, why: str) -> None:
        self.refreshes.failures += 1
        self.refreshes.problem = why


@dataclass(frozen=True, slots=True)
class _Verified:
    """A token, and whether what it was believed by is still so."""

    token: Token
    is_good: Callable[[], bool]


class Authenticator:
    """Verifies bearer tokens of the configured issuers, each token once.

    A verified token is remembered by the SHA-256 of its text, at most `MAX_VERIFIED` of them, and
    its text is not kept. That is safe because a signature over the same bytes by the same key can
    not become wrong, because there is one spelling of every token (`sidecar.policy.tokens`), and
    because what can change is asked each time: the clock (`exp`, `nbf`, `iat`), and whether the
    issuer still has the key and its keys are still good. The issuers are frozen; other settings are
    another `Authenticator`.

    It would not be safe for what is no property of the bytes: a proof of possession that belongs to
    one connection or request. What a cluster says of a token (TokenReview) is none either, so it is
    remembered for the few seconds of `Review.remember` and no longer. And it does not see a token
    that its issuer takes back before it expires; nor does verifying anew. That is what the policy's
    revocation data is for.
    """

    def __init__(
        self,
        issuers: Sequence[Issuer],
        *,
        fetch: Fetch | None = None,
        post: Post | None = None,
        now: Clock = time.time,
    ) -> None:
        self._now = now
        self._issuers = {each.name: each for each in issuers}
        if len(self._issuers) != len(issuers):
            raise ValueError("an issuer is configured once")
        self._keys = {
            each.name: IssuerKeys(each, fetch or fetch_url, now)
            for each in self._issuers.values()
            if each.review is None
        }
        self._reviewers = {
            each.name: Reviewer(each, each.review, now, post)
            for each in issuers
            if each.review is not None
        }
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()

    async def authenticate(self, token: str) -> Token:
        """The token, verified.

        Raises:
            Unauthenticated: it is no good, or can not be checked; its code says why.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._remembered(digest)
        return known if known is not None else await self._verify(token, digest)

    async def warm(self) -> None:
        """Fetch every issuer's keys, so that the first calls need not wait for them."""
        await asyncio.gather(*(each.warm() for each in self._keys.values()))

    @property
    def keys(self) -> Mapping[str, IssuerKeys]:
        """The keys of each issuer that has any here."""
        return self._keys

    async def close(self) -> None:
        """End what is going on."""
        for keys in self._keys.values():
            await keys.close()
        for reviewer in self._reviewers.values():
            await reviewer.close()

    def _remembered(self, digest: bytes) -> Token | None:
        found = self._verified.get(digest)
        if found is None:
            return None
        if not found.is_good():
            del self._verified[digest]
            return None
        try:
            tokens.check_times(found.token, self._now())
        except Unauthenticated:
            del self._verified[digest]
            raise
        self._verified.move_to_end(digest)
        return found.token

    async def _verify(self, text: str, digest: bytes) -> Token:
        unverified = tokens.look(text)
        issuer = self._issuers.get(unverified.issuer)
        if issuer is None:
            raise Unauthenticated("token_issuer", "the token's issuer is not believed here")
        if unverified.algorithm not in issuer.algorithms:
            raise Unauthenticated("token_algorithm", "the token's algorithm is not accepted")
        if issuer.review is not None:
            found = await self._reviewed(text, unverified, digest)
        else:
            found = await self._signed(unverified, issuer)
        self._verified[digest] = found
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return found.token

    async def _signed(self, unverified: Unverified, issuer: Issuer) -> _Verified:
        keys = self._keys[issuer.name]
        key = await keys.find(unverified)
        token = tokens.verify(unverified, issuer, key, self._now())
        return _Verified(token, lambda: key in keys.current())

    async def _reviewed(self, text: str, unverified: Unverified, digest: bytes) -> _Verified:
        reviewer, asked = self._reviewers[unverified.issuer], self._now()
        token = await reviewer.review(text, unverified, digest)
        return _Verified(token, lambda: reviewer.is_fresh(asked))


async def fetch_url(source: KeySource, url: str) -> bytes:
    """What a URL holds, and nothing but 200 will do: a redirect would let others answer.

    Raises:
        KeysUnusable: not reached, late, too large, another status.
    """
    try:
        headers = _headers(source)
        trust = True if source.ca is None else ssl.create_default_context(cafile=source.ca)
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=source.timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            ) as session,
            session.get(url, headers=headers, allow_redirects=False, ssl=trust) as response,
        ):
            if response.status != 200:
                raise KeysUnusable(f"the issuer answered {response.status}")
            return await _body(response, source.max_size)
    except TimeoutError as error:
        raise KeysUnusable(f"the issuer did not answer within {source.timeout:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise KeysUnusable(f"the issuer is not reached: {type(error).__name__}") from error


def _headers(source: KeySource) -> dict[str, str]:
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if source.bearer is not None:
        # Read each time: such tokens are rotated.
        headers["Authorization"] = f"Bearer {Path(source.bearer).read_text('ascii').strip()}"
    return headers


async def _body(response: aiohttp.ClientResponse, most: int) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > most:
            raise KeysUnusable(f"the issuer's answer has more than {most} bytes")
    return bytes(content)


def _object(content: bytes) -> JsonObject:
    with suppress(MalformedMessage):
        value = parse_json(content, FROM_SERVER)
        if isinstance(value, dict):
            return value
    raise KeysUnusable("the discovery document is not a JSON object")


def _over(since: float | None, seconds: float, now: float) -> bool:
    """Whether that long has passed; a clock that was set back has lost count, so yes."""
    return since is None or not 0 <= now - since < seconds
