"""D's end: requests to many servers, each with its own deadline."""

from __future__ import annotations

from vllm_datadist_connector._native import (
    MAX_LEASES_PER_MESSAGE,
    ChannelAnswer,
    ChannelClient,
    Confirmed,
    RankDescription,
    Refused,
    Released,
    Renewed,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.endpoint import Trust

__all__ = [
    "MAX_LEASES_PER_MESSAGE",
    "ChannelAnswer",
    "ChannelClient",
    "Confirmed",
    "RankDescription",
    "Refused",
    "Released",
    "Renewed",
    "open_client",
]


def open_client(trust: Trust) -> ChannelClient:
    return ChannelClient(PROTOCOL_VERSION, trust.auth, trust.insecure)
