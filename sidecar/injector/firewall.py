"""The rules of mode `redirect`, as one transaction of nftables.

Source: nft(8); Linux, Documentation/networking/nf_conntrack (redirect in OUTPUT goes to loopback).
"""

from __future__ import annotations

TABLE = "inet mcp_opa_sidecar"


def ruleset(port: int, to: int, except_uid: int) -> str:
    """Whatever dials `port` of this network namespace gets `to`, but for one user on loopback.

    Both families, from outside and from within. Applied again it replaces itself, all at once. The
    exception is a rule of its own, before the other, so that what has no known owner is none.
    """
    return f"""\
table {TABLE}
delete table {TABLE}
table {TABLE} {{
    chain from_outside {{
        type nat hook prerouting priority dstnat; policy accept;
        tcp dport {port} redirect to :{to}
    }}
    chain from_within {{
        type nat hook output priority -100; policy accept;
        oifname "lo" tcp dport {port} meta skuid {except_uid} accept
        oifname "lo" tcp dport {port} redirect to :{to}
    }}
}}
"""
