"""In place of the thread that tells P how its leases fare: counts who holds them."""

from __future__ import annotations

from collections import Counter

from vllm_datadist_connector.protocol.params import LeaseTicket
from vllm_datadist_connector.side_channel.endpoint import Endpoint


class CountingKeeper:
    def __init__(self) -> None:
        self.users: Counter[str] = Counter()
        self.endpoints: list[Endpoint] = []
        self.gone: set[str] = set()
        self.unanswered: set[str] = set()
        self.full = False

    def hold(self, endpoint: Endpoint, ticket: LeaseTicket) -> bool:
        if self.full:
            return False
        self.endpoints.append(endpoint)
        self.users[ticket.token] += 1
        return True

    def holds(self, ticket: LeaseTicket) -> bool:
        return ticket.token not in self.gone

    def stands(self, ticket: LeaseTicket) -> bool | None:
        return None if ticket.token in self.unanswered else self.holds(ticket)

    def release(self, ticket: LeaseTicket) -> None:
        self.users[ticket.token] -= 1
        assert self.users[ticket.token] >= 0

    def close(self) -> None:
        pass
