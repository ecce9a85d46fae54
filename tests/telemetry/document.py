"""The document of everything that is emitted, written out of the sidecar's own tables.

    python -m tests.telemetry.document

writes `k8s/observability/attributes.md`; a test fails when the document says something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from sidecar.telemetry.attributes import ATTRIBUTES, MAX_ITEMS, MAX_NAMES, MAX_TEXT, Attribute
from sidecar.telemetry.metrics import METRICS, Metric

DOCUMENT = Path(__file__).parents[2] / "k8s" / "observability" / "attributes.md"

HEAD = f"""# What the sidecar tells those who watch

Written by `python -m tests.telemetry.document` out of the tables in `sidecar/telemetry`; nothing
else is emitted. Names and kinds are those of the OpenTelemetry conventions for MCP and GenAI where
they have one, else `actor.*` and `authz.*`.

## Spans

| span | kind | name | when |
|---|---|---|---|
| server | SERVER | `{{mcp.method.name}} {{tool or prompt}}` | each action |
| policy | CLIENT | `policy.evaluate mcp/authz` | the policy was asked; OPA's own is below it |
| upstream | CLIENT | as server | it was let through; the server's own is below it |

A tool or prompt is in a span's name when the server lists it or the policy vouches for it, and at
most {MAX_NAMES} of them are; a method of no table is `_OTHER` there. Texts have at most {MAX_TEXT}
characters, lists {MAX_ITEMS} entries. What has no value is not there.

A span's status is ERROR when it has `error.type`. A denial is no error of the policy span, and the
asker's own mistakes (-32700, -32600, -32601, -32602, -32002) are none of the SERVER span. Methods
that begin with `stream/` are the sidecar's own: an HTTP stream that is opened, resumed or closed.
Notifications of servers have no spans.

| attribute | spans | value |
|---|---|---|
"""

BETWEEN = """| `authz.x.*` | server, policy | the policy's own remarks, at most 16 |

## Metrics

Over OTLP, and as Prometheus text on the admin port, from one source. No label is an id, a URI, a
chain or a session; tools, prompts, reasons, owners and codes are bounded in number, and what is
beyond is `_OTHER`.

| metric | in Prometheus | kind | unit | labels | what |
|---|---|---|---|---|---|
"""

ORDER = ("server", "policy", "upstream")


def document() -> str:
    """The whole text."""
    return HEAD + "".join(spans(ATTRIBUTES)) + BETWEEN + "".join(map(metric, METRICS))


def spans(rows: Iterable[Attribute]) -> Iterator[str]:
    for row in rows:
        places = ", ".join(each for each in ORDER if each in row.spans)
        note = row.note.replace("|", r"\|")
        yield f"| `{row.name}` | {places} | {note} |\n"


def metric(row: Metric) -> str:
    labels = ", ".join(f"`{each}`" for each in row.labels)
    kind = row.kind.removeprefix("observed ")
    cells = (f"`{row.name}`", f"`{in_prometheus(row)}`", kind, row.unit, labels, row.description)
    return f"| {' | '.join(cells)} |\n".replace("|  |", "| |")


def in_prometheus(row: Metric) -> str:
    """Its name in the Prometheus text; a histogram's is what `_bucket`, `_sum`, `_count` follow."""
    unit = "_seconds" if row.unit == "s" else ""
    return row.name.replace(".", "_") + unit + ("_total" if row.kind.endswith("counter") else "")


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
