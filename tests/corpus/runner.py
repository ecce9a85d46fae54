"""Runs the cases at a place, and looks after each one at what was executed.

An ordinary call behind each case is the barrier: when it is answered the server has done whatever
the case had it do, and the sidecar is alive. What the witness then has must be that call, and the
calls of the harmless tool that the case lets through where the policy does, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.corpus.cases import Case
from tests.corpus.places import DIRECT, ECHO_ONLY, Place, World, roads_to
from tests.corpus.roads import NOTHING, Road
from tests.support import permissive_server

HARMLESS = ("tools/call", "echo")
ACTIONS = frozenset({"sampling/createMessage", "elicitation/create", "roots/list", "vendor/danger"})
FIRST = 1000


@dataclass
class Report:
    """What came of the cases at a place under a policy, by road."""

    place: Place
    policy: str
    runs: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    live: set[tuple[str, str]] = field(default_factory=set)


class Witness:
    """What a server did since somebody last looked."""

    def __init__(self, log: Path) -> None:
        self._log, self._seen = log, 0

    def news(self) -> Counter[tuple[str, str]]:
        """What acts, by method and name; an answer that was taken for one is an action too."""
        records = permissive_server.records(self._log)
        new, self._seen = records[self._seen :], len(records)
        done = [
            (str(each["method"]), str(each["name"]))
            for each in new
            if each["what"] == "message" and permissive_server.acts(each)
        ]
        done += [
            ("answer", str(each["message"].get("id")))
            for each in new
            if each["what"] == "answer" and "result" in each["message"]
        ]
        return Counter(done)


def run(world: World, place: Place, policy: str, cases: Sequence[Case]) -> Report:
    """Run every case that a road to the place can carry."""
    report = Report(place, policy)
    log = world.folder / f"{place}-{policy}.log"
    witness = Witness(log)
    with roads_to(world, place, policy, log) as road_to:
        for name in place.roads:
            fitting = [each for each in cases if _fits(each, place, name)]
            road = road_to(name)
            witness.news()
            for number, case in enumerate(fitting, FIRST):
                _run_case(report, road, witness, case, number)
    if late := _harm(policy, witness.news()):
        report.problems.append(f"executed after all: {late}")
        report.executed[place.roads[-1]] += sum(late.values())
    return report


def _fits(case: Case, place: Place, road: str) -> bool:
    kinds = {step.kind for step in case.steps}
    if "raw" in kinds and road != place.roads[0]:
        return False  # one parser, whatever the revision
    there = (
        place.server == "permissive"
        if "says" in kinds
        else place.server in (case.servers or place.server)
    )
    return road in case.roads and there


def _run_case(report: Report, road: Road, witness: Witness, case: Case, number: int) -> None:
    policy, where = report.policy, f"{report.place} {road.name} {report.policy}: {case.name}"
    expected = [_under(policy, each) for each in case.expected(road.name)]
    waits, replies = not NOTHING & {*expected} and policy != DIRECT, list[str]()
    road.heard.clear()
    for count, step in enumerate(case.steps):
        answered = waits and not step.options.get("silent")
        replies = road.send(step, number * 10 + count, waits=answered)
    barrier = road.ask("$ECHO" if policy in (ECHO_ONLY, DIRECT) else "$LIST", number * 10 + 9)
    done = witness.news()
    report.runs[road.name] += 1
    if policy == DIRECT:
        if _harm(policy, done) or any(map(_is_harmful, road.heard)):
            report.live.add((case.name, road.name))
        return
    problems = _judge(policy, case, done, replies, expected)
    if barrier != "result":
        problems.append(f"the ordinary call behind it: {barrier}")
    if heard := [each for each in road.heard if _is_harmful(each)]:
        problems.append(f"the client heard {heard[0]}")
        report.executed[road.name] += 1
    report.executed[road.name] += sum(_harm(policy, done).values())
    report.problems += [f"{where}: {each}" for each in problems]


def _under(policy: str, word: str) -> str:
    """What a word means under a policy: only one lets calls through, and both let `passes` pass."""
    if word == "result" and policy != ECHO_ONLY:
        return "denied"
    return "result" if word == "passes" else word


def _judge(
    policy: str,
    case: Case,
    done: Counter[tuple[str, str]],
    replies: list[str],
    expected: list[str],
) -> list[str]:
    problems = []
    if harm := _harm(policy, done):
        problems.append(f"EXECUTED {dict(harm)}")
    let = done[HARMLESS] - 1
    if policy == ECHO_ONLY and let not in case.lets:
        problems.append(f"{let} harmless calls were let through, not {case.lets}")
    if not _as_expected(replies, expected):
        problems.append(f"answered {replies}, not {expected}")
    return problems


def _as_expected(replies: list[str], expected: list[str]) -> bool:
    if not replies:
        return bool(NOTHING & {*expected})
    return bool({*replies} & {*expected})


def _harm(policy: str, done: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    allowed = {HARMLESS} if policy in (ECHO_ONLY, DIRECT) else set()
    return Counter({key: count for key, count in done.items() if key not in allowed})


def _is_harmful(message: permissive_server.Object) -> bool:
    return message.get("method") in ACTIONS or "stolen" in str(message.get("result"))
