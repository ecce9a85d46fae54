"""Evidence becomes one actor: combined, not raced.

Each piece of evidence is a chain of its own: a workload (a client certificate, a Kubernetes service
account) is one principal; a token is its subject, behind whoever its issuer says acts for it. The
workload stands in front, since it is what is on the other end; what it presents says for whom. One
principal that two pieces tell of stands in the chain once.

What a chain means::

    workload   token's outer `act`  …  token's inner `act`   client that is an agent   `sub`
    ^ acts                            handed the matter on                             ^ for whom

Types come from the ordered rules, the first that fits; else from the defaults, which would rather
say `unknown`, which holds no grants, than take one tier for another. A client's own token and a
Kubernetes account are never human, whatever a rule says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from sidecar.errors import Unauthenticated
from sidecar.policy.identity import (
    MAX_CHAIN,
    UNKNOWN,
    Actor,
    Principal,
    PrincipalType,
    TokenFacts,
)
from sidecar.policy.issuers import Issuer
from sidecar.policy.spiffe import Workload
from sidecar.policy.tokens import Token, text

Source = Literal["mtls", "kubernetes", "jwt", "proxy"]

_SERVICE_ACCOUNT = re.compile(r"system:serviceaccount:([a-z0-9.-]+):([a-z0-9.-]+)")
_KUBERNETES = "kubernetes.io"
_CLIENT_CLAIMS = ("client_id", "azp", "cid", "appid")
_FOR_OTHERS = ("service", "agent")
_GRANTS = (("gty", "client-credentials"), ("grant_type", "client_credentials"), ("idtyp", "app"))
"""How some issuers mark a client's own token; all know it by `sub` and the client's id too."""


@dataclass(frozen=True, slots=True)
class TypeRule:
    """What a principal is when all of it fits. In patterns `*` stops at a `/`, and `**` does not.

    `claim` is a dotted path into the token's claims (into the `act` object's, for who stands
    there); a list fits when one of its items does.
    """

    type: PrincipalType
    source: Source | None = None  # where the evidence comes from
    issuer: str | None = None  # pattern of the issuer
    subject: str | None = None  # pattern of the id: `sub`, a SPIFFE id, NAMESPACE/ACCOUNT
    claim: str | None = None  # claim that must be there, and is …
    equals: str | int | bool | None = None  # … this value
    glob: str | None = None  # … a string of this pattern

    def __post_init__(self) -> None:
        if self.claim is None and (self.equals is not None or self.glob is not None):
            raise ValueError("`equals` and `glob` say what a `claim` is")
        if self.equals is not None and self.glob is not None:
            raise ValueError("a rule has `equals` or `glob`, not both")
        if not any((self.source, self.issuer, self.subject, self.claim)):
            raise ValueError("a rule without a condition would fit everybody")
        if self.type == "agent" and self.claim in _CLIENT_CLAIMS:
            # It would turn the person whom an agent serves into the agent.
            raise ValueError("a client that is an agent is listed with its issuer, under `agents`")


@dataclass(frozen=True, slots=True)
class Asserted:
    """Whom a trusted proxy says it speaks for."""

    id: str
    issuer: str  # the name that the configuration gives the proxy
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Known:
    """A principal before its type is known."""

    source: Source
    issuer: str
    id: str
    claims: Mapping[str, Any] = field(default_factory=dict)
    default: PrincipalType = "unknown"
    machine: bool = False


def identify(
    rules: Sequence[TypeRule] = (),
    *,
    workload: Workload | None = None,
    account: Token | None = None,
    token: Token | None = None,
    asserted: Asserted | None = None,
) -> Actor:
    """The actor behind verified evidence; `UNKNOWN` when there is none.

    `account` is a Kubernetes token beside another `token`; one that comes alone is known by its
    issuer's kind.

    Raises:
        Unauthenticated: `token_claims`, `chain_malformed`, `chain_too_long`.
    """
    chain: tuple[Principal, ...] = ()
    sources: list[Source] = []
    if workload is not None:
        chain, sources = (_principal(rules, _known(workload)),), [_shown_by(workload)]
    for each in (account, token):
        if each is not None:
            chain = _behind(chain, _of_token(rules, each))
            sources.append(_source(each.issuer))
    if asserted is not None and (token is None or chain[-1].type in _FOR_OTHERS):
        # A proxy's own credential, and whom it speaks for. A token with a subject of its own has
        # said for whom already, and is more than a header.
        chain = _behind(chain, (_of_proxy(rules, asserted),))
        sources.append("proxy")
    if not chain:
        return UNKNOWN
    if len(chain) > MAX_CHAIN:
        raise Unauthenticated("chain_too_long", f"a chain has at most {MAX_CHAIN} principals")
    if workload is not None and chain[0].type == "unknown":
        # Last, since a token of its own may say what it is: an agent, say.
        settled = _type(rules, _known(workload, "service"))
        chain = (replace(chain[0], type=settled), *chain[1:])
    tokens = [each for each in (token, account) if each is not None]
    return Actor(
        chain=chain,
        assurance=1 if "proxy" in sources else 3 if workload else 2,
        sources=tuple(dict.fromkeys(sources)),
        token=_facts(tokens),
        purpose=_purpose(tokens),
        expires_at=_first(
            None if workload is None else workload.expires_at, *(each.ends_at for each in tokens)
        ),
    )


def _behind(front: tuple[Principal, ...], back: tuple[Principal, ...]) -> tuple[Principal, ...]:
    """One chain of two; who ends the one and begins the other stands in it once.

    A SPIFFE id means the same workload whoever writes it down, so that a token's actor is found in
    the workload that presents it. The proven one stays, with the token's scopes; groups and claims
    it takes from its own issuer only, since they mean something there alone.
    """
    if not front or not back:
        return front or back
    proven, told = front[-1], back[0]
    same = proven.key == told.key
    if not same and not (proven.id.startswith("spiffe://") and proven.id == told.id):
        return front + back
    merged = replace(
        proven,
        type=told.type if proven.type == "unknown" else proven.type,
        groups=told.groups if same else (),
        scopes=told.scopes,
        claims=told.claims if same else {},
    )
    return (*front[:-1], merged, *back[1:])


def _known(workload: Workload, default: PrincipalType = "unknown") -> _Known:
    return _Known(_shown_by(workload), workload.issuer, workload.id, default=default)


def _shown_by(workload: Workload) -> Source:
    return "proxy" if workload.asserted else "mtls"


def _of_proxy(rules: Sequence[TypeRule], asserted: Asserted) -> Principal:
    known = _Known("proxy", asserted.issuer, asserted.id)
    return replace(_principal(rules, known), groups=asserted.groups)


def _of_token(rules: Sequence[TypeRule], token: Token) -> tuple[Principal, ...]:
    """Who acts by a token, the outermost first, and its subject last."""
    if token.issuer.kind == "kubernetes":
        return (_of_account(rules, token),)
    subject = _subject(rules, token)
    actors = [*_acting(rules, token)]
    known = {each.key for each in (subject, *actors)}
    for client in _clients(token):
        agent = Principal("agent", client, token.issuer.name)
        if client in token.issuer.agents and agent.key not in known:
            actors.append(agent)
            known.add(agent.key)
    return (*actors, subject)


def _subject(rules: Sequence[TypeRule], token: Token) -> Principal:
    """Whom a token is about; its groups, scopes and claims are the subject's."""
    issuer, claims = token.issuer, token.claims
    clients, sub = _clients(token), text(token.claims, "sub")
    own = sub is None or sub in clients or any(claims.get(n) == v for n, v in _GRANTS)
    default: PrincipalType = "unknown"
    if own:
        # Known by the client's id, as where it acts for somebody: one principal, one key.
        sub = sub if sub in clients or not clients else clients[0]
        default = "agent" if sub in issuer.agents else "service"
    elif clients and set(clients) <= set(issuer.interactive):
        default = "human"
    if sub is None:
        raise Unauthenticated("token_claims", "the token has neither a subject nor a client")
    known = _Known("jwt", issuer.name, sub, claims, default, machine=own)
    return replace(
        _principal(rules, known),
        groups=_words(_at(claims, issuer.groups)),
        scopes=_words(claims.get("scope", claims.get("scp"))),
        claims=_shown(claims, issuer),
    )


def _acting(rules: Sequence[TypeRule], token: Token) -> Iterator[Principal]:
    """The actors of a nested `act` (RFC 8693 §4.1), the outermost first."""
    issuer, outer = token.issuer, token.claims
    for _ in range(MAX_CHAIN):
        if "act" not in outer:
            return
        act = outer["act"]
        if not isinstance(act, dict) or "sub" not in act:
            raise Unauthenticated("chain_malformed", "an actor is an object with a sub")
        yield _actor(rules, issuer, act)
        outer = act
    raise Unauthenticated("chain_too_long", f"a chain has at most {MAX_CHAIN} principals")


def _actor(rules: Sequence[TypeRule], issuer: Issuer, act: Mapping[str, Any]) -> Principal:
    """One object of `act`. An issuer speaks of its own principals, and of others' if it may."""
    name = act.get("iss", issuer.name)
    if name != issuer.name and name not in issuer.actor_issuers:
        raise Unauthenticated("chain_malformed", "an actor is of an issuer that may not be named")
    try:
        actor_id = text(act, "sub") or ""
    except Unauthenticated as error:
        raise Unauthenticated("chain_malformed", "an actor's sub is not usable") from error
    listed = name == issuer.name and actor_id in issuer.agents
    known = _Known("jwt", name, actor_id, act, "agent" if listed else "unknown")
    return replace(_principal(rules, known), groups=_words(_at(act, issuer.groups)))


def _of_account(rules: Sequence[TypeRule], token: Token) -> Principal:
    """A service account, as NAMESPACE/NAME; the token's two ways to name it must agree."""
    if "act" in token.claims:
        raise Unauthenticated("chain_malformed", "a service account's token has no actor")
    found = _SERVICE_ACCOUNT.fullmatch(text(token.claims, "sub") or "")
    bound = token.claims.get(_KUBERNETES)
    if found is None or not isinstance(bound, dict):
        raise Unauthenticated("token_claims", "the token is not a bound service account's")
    told = {
        "namespace": bound.get("namespace"),
        "service_account": _at(bound, "serviceaccount.name"),
        "pod": _at(bound, "pod.name"),
        "pod_uid": _at(bound, "pod.uid"),
        "node": _at(bound, "node.name"),
    }
    if (told["namespace"], told["service_account"]) != found.groups():
        raise Unauthenticated("token_claims", "the token names two service accounts")
    if token.issuer.pod_required and not (told["pod"] and told["pod_uid"]):
        raise Unauthenticated("token_claims", "the token is bound to no pod")
    claims = {name: value for name, value in told.items() if isinstance(value, str)}
    name = "/".join(found.groups())
    known = _Known("kubernetes", token.issuer.name, name, claims, "service", machine=True)
    return replace(_principal(rules, known), claims=claims)


def _principal(rules: Sequence[TypeRule], known: _Known) -> Principal:
    return Principal(_type(rules, known), known.id, known.issuer)


def _type(rules: Sequence[TypeRule], known: _Known) -> PrincipalType:
    for rule in rules:
        if _fits(rule, known) and not (known.machine and rule.type == "human"):
            return rule.type
    return known.default


def _fits(rule: TypeRule, known: _Known) -> bool:
    return (
        rule.source in (None, known.source)
        and (rule.issuer is None or _matches(rule.issuer, known.issuer))
        and (rule.subject is None or _matches(rule.subject, known.id))
        and (rule.claim is None or _claim_fits(rule, _at(known.claims, rule.claim)))
    )


def _claim_fits(rule: TypeRule, value: Any) -> bool:
    """Whether a claim, or an item of it, is what the rule says. `1` is not `true`, nor `"1"`."""
    if rule.equals is None and rule.glob is None:
        return value is not None
    for each in value if isinstance(value, list) else [value]:
        if rule.glob is not None and isinstance(each, str) and _matches(rule.glob, each):
            return True
        if rule.equals is not None and type(each) is type(rule.equals) and each == rule.equals:
            return True
    return False


def _matches(pattern: str, value: str) -> bool:
    return _compiled(pattern).fullmatch(value) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    wild = {"**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(wild.get(each, re.escape(each)) for each in parts), re.DOTALL)


def _source(issuer: Issuer) -> Source:
    return "kubernetes" if issuer.kind == "kubernetes" else "jwt"


def _clients(token: Token) -> list[str]:
    """The ids by which a token names its client; it may have several claims for it."""
    named = (text(token.claims, name) for name in token.issuer.clients)
    return list(dict.fromkeys(each for each in named if each is not None))


def _at(claims: Mapping[str, Any], path: str) -> Any:
    """What stands at a claim's name, or at a dotted path of names; None when nothing does."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _words(value: Any) -> tuple[str, ...]:
    """A list of strings, or a string of words; what is neither says nothing."""
    if isinstance(value, str):
        return tuple(value.split())
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    return ()


def _shown(claims: Mapping[str, Any], issuer: Issuer) -> Mapping[str, Any]:
    found = {path: _at(claims, path) for path in issuer.claims}
    return {path: value for path, value in found.items() if value is not None}


def _facts(tokens: Sequence[Token]) -> TokenFacts | None:
    """Of two, the first is shown; the evidence is gone when either expires."""
    if not tokens:
        return None
    first = tokens[0]
    return TokenFacts(min(each.expires_at for each in tokens), first.id, first.issued_at)


def _first(*times: float | None) -> float | None:
    """When the first piece of evidence is good no more; None when none ever is."""
    return min((each for each in times if each is not None), default=None)


def _purpose(tokens: Sequence[Token]) -> str | None:
    for token in tokens:
        value = _at(token.claims, token.issuer.purpose) if token.issuer.purpose else None
        if isinstance(value, str):
            return value
    return None
