"""D's end: requests to many servers, each with its own deadline, and leases that are kept alive at them."""

from __future__ import annotations

from vllm_datadist_connector._native import (
    MAX_LEASES_PER_MESSAGE,
    ChannelAnswer,
    ChannelClient,
    Confirmed,
    HandoffNews,
    LeaseKeeper,
    Offered,
    ProgressReporter,
    RankDescription,
    Refused,
    Released,
    Renewed,
    Reported,
    Switched,
    Watched,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.endpoint import Trust

__all__ = [
    "MAX_LEASES_PER_MESSAGE",
    "ChannelAnswer",
    "ChannelClient",
    "Confirmed",
    "HandoffNews",
    "LeaseKeeper",
    "Offered",
    "ProgressReporter",
    "RankDescription",
    "Refused",
    "Released",
    "Renewed",
    "Reported",
    "Switched",
    "Watched",
    "open_client",
    "open_keeper",
]


def open_client(trust: Trust) -> ChannelClient:
    return ChannelClient(PROTOCOL_VERSION, trust.auth, trust.insecure)


def open_keeper(trust: Trust, answer_timeout_s: float) -> LeaseKeeper:
    return LeaseKeeper(PROTOCOL_VERSION, answer_timeout_s, trust.auth, trust.insecure)
