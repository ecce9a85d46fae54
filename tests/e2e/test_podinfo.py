"""The labels of the pod, as the downward API has them, are the policy's to read."""

from __future__ import annotations

from pathlib import Path

from tests.support.identity import guarded
from tests.support.issuing import claims
from tests.support.processes import done
from tests.support.raw import call, mirrors, modern

CLOSED = """
package mcp.custom

deny contains {"code": "closed", "message": "This desk is closed."} if {
	input.context.pod.labels["desk.example.com/open"] == "no"
}
"""


def test_a_policy_reads_the_labels_and_sees_them_change(tmp_path: Path, opa_bin: Path) -> None:
    labels = tmp_path / "labels"
    labels.write_text('app="tickets"\ndesk.example.com/open="no"\n')
    message = call(1, "get_ticket", id=4711)
    more = {"pod": {"labels_file": str(labels)}}
    with guarded(tmp_path, opa_bin, rego=CLOSED, more=more) as place:
        token = place.issuer.token(claims(sub="ana"))
        error = place.post(modern(message), token, *mirrors(message)).message["error"]
        assert error["data"]["reasons"][0]["code"] == "closed"
        labels.write_text('app="tickets"\ndesk.example.com/open="from nine"\nno label\n')
        assert "result" in place.post(modern(message), token, *mirrors(message)).message
        place.front.process.wait_for("line 2 is no label")
        place.front.process.wait_for("line 3 is no label")
        assert done(place.log) == ["get_ticket"]
