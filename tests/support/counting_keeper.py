"""In place of the thread that tells P how its leases fare: counts who holds them."""

from __future__ import annotations

from collections import Counter

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

    def hold(self, endpoint: Endpoint, token: str, lease_s: float, is_news: bool = True) -> bool:
        if self.full:
            return False
        assert lease_s > 0
        self.endpoints.append(endpoint)
        self.users[token] += 1
        if not is_news:
            self.asked.add(token)
        return True

    def holds(self, token: str) -> bool | None:
        is_open = token in self.asked & self.unanswered
        return None if is_open else token not in self.gone

    def pulls(self, token: str, at_most_s: float) -> None:
        assert at_most_s > 0
        self.pulled.append(token)

    def lose(self, token: str) -> None:
        self.gone.add(token)

    def release(self, token: str) -> None:
        self.users[token] -= 1
        assert self.users[token] >= 0

    def close(self) -> None:
        pass
