"""Mode `client`: an agent's pod, whose calls to MCP servers go out through a sidecar of its own.

The variables that tell the agent where its servers are say where the sidecar is instead, and the
sidecar goes on to what they said: over TLS, where that is an https URL. Who calls is the pod's
service account, as an agent, unless the sidecar's configuration says how to tell. An agent that
dials elsewhere is not held up by this: a NetworkPolicy does that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from sidecar.errors import InjectionRefused
from sidecar.injector.injection import PREFIX, SIDECAR_PORT, Injection, Json
from sidecar.injector.mode import Mode
from sidecar.injector.wishes import LOOPBACK, VARIABLE, Server, Wish, candidates

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]{1,255}(/[A-Za-z0-9._~/-]{0,200})?")
_EXAMPLE = "NAME=VARIABLE, such as tickets=TICKETS_URL"


def _wish(spec: Json, said: Mapping[str, str]) -> Wish:
    containers = candidates(spec, said)
    if len(containers) != 1:
        raise InjectionRefused(f"{len(containers)} containers may be the agent: {PREFIX}container")
    [agent] = containers
    pairs = [each.strip() for each in said.get("servers", "").split(",") if each.strip()]
    servers = tuple(_server(pair, agent) for pair in pairs)
    if not servers:
        raise InjectionRefused(f"{PREFIX}servers has to say which servers: {_EXAMPLE}")
    for what, there in (
        ("names", {each.name for each in servers}),
        ("variables", {each.variable for each in servers}),
    ):
        if len(there) < len(servers):
            raise InjectionRefused(f"{PREFIX}servers: two of the {what} are the same")
    return Wish(mode="client", container=agent["name"], port=SIDECAR_PORT, servers=servers)


def _server(pair: str, agent: Json) -> Server:
    name, _, variable = pair.partition("=")
    if not _NAME.fullmatch(name) or not VARIABLE.fullmatch(variable):
        raise InjectionRefused(f"{PREFIX}servers: {pair!r} is not {_EXAMPLE}")
    values = [each.get("value") for each in agent.get("env") or () if each["name"] == variable]
    url = values[-1] if values else None
    if url is None or not _URL.fullmatch(url):
        raise InjectionRefused(
            f"{PREFIX}servers: the variable {variable} of container {agent['name']} has to be the"
            " URL of a server, as it stands: http(s)://HOST[:PORT]/PATH"
        )
    return Server(name, variable, url)


def _arguments(wish: Wish, injection: Injection) -> list[str]:
    found = [f"--listen={LOOPBACK}:{wish.port}"]
    found += [f"--upstream={each.name}={each.url}" for each in wish.servers]
    if injection.config is None:
        account = "system:serviceaccount:$(POD_NAMESPACE):$(POD_SERVICE_ACCOUNT)"
        found.append(f"--actor=agent:{account}")
    return found


def _told(wish: Wish) -> Mapping[str, str]:
    base = f"http://{LOOPBACK}:{wish.port}"
    return {
        each.variable: f"{base}/{each.name}{urlsplit(each.url).path}".rstrip("/")
        for each in wish.servers
    }


CLIENT = Mode(
    annotations=frozenset({"container", "servers"}),
    wish=_wish,
    arguments=_arguments,
    told=_told,
    guarded=False,
)
