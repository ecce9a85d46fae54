"""Mode `front` on a real node: pods as a webhook, a kubelet and runc make them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.registered import ENABLED
from tests.kubelet.conftest import RESTRICTED, Pod, Rig, server
from tests.kubelet.reaching import call, tools
from tests.support.processes import done

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module", params=[True, False], ids=["native", "ordered"])
def pod(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Pod]:
    """The pod of a Deployment, in a namespace with the strictest standard."""
    with rig.namespace({**ENABLED, **RESTRICTED}, native=request.param) as namespace:
        made = rig.deploy(namespace, server())
        found = Pod(rig, namespace, made["metadata"]["name"])
        found.wait_ready()
        yield found


def test_clients_get_what_the_policy_allows(pod: Pod) -> None:
    assert tools(pod.ip) == ["search_tickets", "get_ticket", "create_ticket", "refund_ticket"]
    log = pod.volume("data") / "log"
    before = len(done(log)) if log.exists() else 0
    assert call(pod.ip, "get_ticket", id=4711) == 0
    assert call(pod.ip, "delete_ticket", id=4711) == -31403
    assert call(pod.ip, "export_all") == -31403
    assert call(pod.ip, "refund_ticket", id=4711, amount=101) == -31403
    assert done(log)[before:] == ["get_ticket"]
