"""Values of the metrics' labels: vLLM's API server names them all in advance, and has neither scheduler nor worker."""

from __future__ import annotations

import enum


class Failure(enum.Enum):
    """Why a pull failed."""

    HANDSHAKE = "handshake"
    LINK = "link"
    PLAN = "plan"
    TRANSFER = "transfer"
    DEADLINE = "deadline"
    LEASE = "lease"
    INTERNAL = "internal"


class LeaseEnd(enum.Enum):
    """How a lease ended: the words of the lease table."""

    RELEASED = "released"
    EXPIRED = "expired"
    UNCLAIMED = "unclaimed"
    REVOKED = "revoked"


class Reason(enum.Enum):
    """Why a request was prefilled here although the instance serves with others."""

    NO_PARAMS = "no_params"
    ROLE = "role"
    SWITCHED = "switched"
    FLAG = "flag"
    PARAMS = "params"
    VERSION = "version"
    PEER = "peer"
    PROMPT = "prompt"
    ADAPTER = "adapter"
    NOTHING_HELD = "nothing_held"
    LEASE_GONE = "lease_gone"
    NO_PREFILL = "no_prefill"
    TOO_MANY = "too_many"


class Transport(enum.Enum):
    """How the blocks of a pull come."""

    CMA = "cma"
    TCP = "tcp"
    OWN = "own"
    """From our own KV cache: no link."""
    OTHER = "other"
    """By several of these, or by one that our engine does not name."""

    @classmethod
    def _missing_(cls, _: object) -> Transport:
        return cls.OTHER
