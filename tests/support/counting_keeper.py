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
        self.asked: set[str] = set()
        self.unanswered: set[str] = set()
        self.full = False
        self.pulled: list[str] = []

    def hold(self, endpoint: Endpoint, ticket: LeaseTicket, is_news: bool = True) -> bool:
        if self.full:
            return False
        self.endpoints.append(endpoint)
        self.users[ticket.token] += 1
        if not is_news:
            self.asked.add(ticket.token)
        return True

    def holds(self, ticket: LeaseTicket) -> bool | None:
        is_open = ticket.token in self.asked & self.unanswered
        return None if is_open else ticket.token not in self.gone

    def pulls(self, ticket: LeaseTicket, at_most_s: float) -> None:
        assert at_most_s > 0
        self.pulled.append(ticket.token)

    def lose(self, ticket: LeaseTicket) -> None:
        self.gone.add(ticket.token)

    def release(self, ticket: LeaseTicket) -> None:
        self.users[ticket.token] -= 1
        assert self.users[ticket.token] >= 0

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
