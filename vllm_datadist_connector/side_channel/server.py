"""P's end: one listener on one address, which answers from a lease table and the ranks' geometries."""

from __future__ import annotations

from vllm_datadist_connector._native import (
    ChannelServer,
    EndedLease,
    HandoffTable,
    LeaseTable,
    ManualClock,
    Refusal,
    RoleSwitch,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

__all__ = ["ChannelServer", "EndedLease", "HandoffTable", "LeaseTable", "ManualClock", "Refusal", "RoleSwitch", "serve"]


def serve(
    endpoint: Endpoint,
    engine_id: str,
    incarnation: str,
    leases: LeaseTable,
    trust: Trust,
    handoffs: HandoffTable | None = None,
    roles: RoleSwitch | None = None,
) -> ChannelServer:
    """Listens on `endpoint` at once; port 0 lets the system choose.

    Raises:
        OSError: names the address that could not be bound.
    """
    try:
        return ChannelServer(
            endpoint.host,
            endpoint.port,
            engine_id,
            incarnation,
            PROTOCOL_VERSION,
            leases,
            trust.auth,
            trust.insecure,
            handoffs=handoffs,
            roles=roles,
        )
    except OSError as error:
        raise OSError(f"side channel: cannot listen on {endpoint}: {error}") from error
