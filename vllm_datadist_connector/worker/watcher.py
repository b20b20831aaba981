"""Watcher: what a rank is told by its own instance's side channel while vLLM's steps go on, or do not.

    WATCH, once at a time ──> the next offer of a D, or order ──> take() ──> WATCH, with its number as seen

Belongs to the driver thread. An idle vLLM takes no steps, and one inside a long forward pass brings metadata late.
"""

from __future__ import annotations

import time

from vllm_datadist_connector.metadata import Home
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, Watched

_PATIENCE_S = 20.0
_PAUSE_S = 0.5
"""After a question that nobody answered: the scheduler's process may be ending, or be very busy."""


class Watcher:
    def __init__(self, client: ChannelClient, rank: tuple[int, int], answer_timeout_s: float) -> None:
        self._client = client
        self._rank = rank
        self._answer_timeout_s = answer_timeout_s
        self._seen = 0
        self._question = 0
        self._again_at: float | None = None
        self.home: Home | None = None

    def watch(self, home: Home) -> None:
        """From now on."""
        if self.home is None:
            self.home = home
            self._ask()

    def take(self, answer: ChannelAnswer) -> tuple[bool, Watched | None]:
        """(whether the answer is to our question, what the rank is told)."""
        if not self._question or answer.id != self._question:
            return False, None
        watched = answer.response if isinstance(answer.response, Watched) else None
        if watched is None and not answer.timed_out:
            self._question, self._again_at = 0, time.monotonic() + _PAUSE_S
            return True, None
        if watched is not None and watched.number:
            self._seen = watched.number
        self._ask()
        return True, watched if watched is not None and watched.number else None

    def try_again(self, now: float) -> None:
        if self._again_at is not None and now >= self._again_at:
            self._ask()

    def next_wake(self) -> float | None:
        return self._again_at

    def _ask(self) -> None:
        self._again_at = None
        if self.home is not None:
            self._question = self._client.watch(
                self.home.endpoint, self.home.key, self._rank, self._seen, _PATIENCE_S, self._answer_timeout_s
            )
