"""LeaseKeeper: D's side of leases. Renews them from the arrival of a request until its KV cache is here, then releases.

One thread, independent of the engine's steps: D may sit in a long compilation or an idle loop while P waits for a sign
of life. It is told at once, because a lease that nobody has asked for is short, and again when a pull begins: one that
is being pulled is the last that P gives up. Several local requests may share a lease (n > 1): it is released with the
last of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

from vllm_datadist_connector.protocol.params import LeaseTicket
from vllm_datadist_connector.side_channel.client import MAX_LEASES_PER_MESSAGE, Renewed, open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.wakeup import Wakeup, wait_readable

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 4
"""Three lost renewals in a row do not cost a lease."""

_NEWS_S = 1.0
"""What P has said of a lease is true for so long, or nearly: it may need the blocks itself."""

_RELEASE_RETRY_S = 1.0
_POLL_S = 0.25
"""While steps are further apart, or a pause has ended them, nobody wakes the thread."""

_PAUSE_AFTER_FAULT_S = 0.1
MAX_HELD = 1 << 16
"""Leases kept alive at once; requests beyond it are prefilled locally."""


@dataclass(slots=True)
class _Kept:
    endpoint: Endpoint
    lease_s: float
    users: int
    next_send: float
    stands: bool
    """What P said of it last, or by its silence."""
    news_at: float
    """When."""
    asked_at: float = 0.0
    """0, or when news was asked for that holds() has not told yet."""
    pulling_until: float = 0.0
    give_up: float = 0.0
    """0 while in use; once released, when retrying the release stops being useful because the lease has run out."""


class LeaseKeeper:
    """hold() and release() come from the scheduler thread and never block; the thread starts with the first hold()."""

    def __init__(self, answer_timeout_s: float, trust: Trust) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._wakeup = Wakeup()
        self._client = open_client(trust)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._has_work = False

    def hold(self, endpoint: Endpoint, ticket: LeaseTicket, is_news: bool = True) -> bool:
        """Starts renewing a lease, or adds a user to it. False if there are too many.

        Args:
            is_news: P has granted it just now. Otherwise it may long have gone: holds() tells only what P says.
        """
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get(ticket.token)
            if kept is not None and not kept.give_up:
                kept.users += 1
                return True
            if len(self._kept) >= MAX_HELD:
                return False
            # At once: of a request that came late, little of the lease is left.
            news_at, asked_at = (now, 0.0) if is_news else (0.0, now)
            self._kept[ticket.token] = _Kept(endpoint, ticket.lease_s, 1, now, is_news, news_at, asked_at)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="datadist-lease-keeper", daemon=True)
                self._thread.start()
            self._has_work = True
            is_first = len(self._kept) == 1
        if is_first:
            self._wakeup.set()
        return True

    def flush(self) -> None:
        """Once per step: to wake the thread costs the scheduler thread its turn, so not with each call."""
        if self._has_work:
            self._has_work = False
            self._wakeup.set()

    def holds(self, ticket: LeaseTicket) -> bool | None:
        """False: the lease is gone, and its blocks are not worth a pull. None: P is being asked, and has time left."""
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get(ticket.token)
            if kept is None or kept.give_up:
                return False
            if not kept.asked_at and now - kept.news_at >= _NEWS_S:
                kept.asked_at = kept.next_send = now
                self._has_work = True
            if kept.asked_at > kept.news_at:
                return None
            # Steps may be further apart than news lasts: what was asked for is told once, however old.
            kept.asked_at = 0.0
            return kept.stands

    def pulls(self, ticket: LeaseTicket, at_most_s: float) -> None:
        """A user of the lease has begun to pull: P is told so, for as long as that can take."""
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get(ticket.token)
            if kept is None or kept.give_up:
                return
            kept.pulling_until = max(kept.pulling_until, now + at_most_s)
            kept.next_send = now
            self._has_work = True

    def lose(self, ticket: LeaseTicket) -> None:
        """P, which we are ourselves, has ended the lease."""
        self._forget_gone((ticket.token,))

    def release(self, ticket: LeaseTicket) -> None:
        """Takes one user off a lease; with the last one, P is told that its blocks are free."""
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get(ticket.token)
            if kept is None or kept.give_up:
                return
            kept.users -= 1
            if kept.users > 0:
                return
            kept.next_send = now
            kept.give_up = now + kept.lease_s
            self._has_work = True

    def close(self) -> None:
        """Stops the thread; leases that are still held run out by themselves."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        self._wakeup.set()
        if thread is not None:
            thread.join(timeout=2.0)
        self._client.close()

    def _run(self) -> None:
        sent: dict[int, tuple[str, ...]] = {}
        while not self._stopping:
            try:
                until = self._send_due(sent)
                if self._wakeup.fileno() in wait_readable([self._wakeup.fileno(), self._client.fileno()], until):
                    self._wakeup.clear()
                for answer in self._client.take():
                    tokens = sent.pop(answer.id, ())
                    if answer.response is None:
                        logger.debug("lease keeper: %s", answer.error)
                        self._hear(tokens, stands=False)
                    elif isinstance(answer.response, Renewed):
                        self._forget_gone(answer.response.gone)
                        self._hear(tokens, stands=True)
                    else:
                        self._forget(tokens)
            except Exception:
                # Leases must go on being renewed whatever one answer did to us; a fault that stays must not spin.
                logger.exception("lease keeper: a round failed")
                time.sleep(_PAUSE_AFTER_FAULT_S)

    def _send_due(self, sent: dict[int, tuple[str, ...]]) -> float | None:
        """Sends what is due, batched per endpoint, and notes it in `sent`; returns when the next is."""
        now = time.monotonic()
        renewals: defaultdict[tuple[Endpoint, bool], list[str]] = defaultdict(list)
        releases: defaultdict[Endpoint, list[str]] = defaultdict(list)
        with self._lock:
            for token in [token for token, kept in self._kept.items() if kept.give_up and kept.give_up <= now]:
                del self._kept[token]
            for token, kept in self._kept.items():
                if kept.next_send > now:
                    continue
                if kept.give_up:
                    releases[kept.endpoint].append(token)
                    kept.next_send = now + _RELEASE_RETRY_S
                else:
                    renewals[kept.endpoint, kept.pulling_until > now].append(token)
                    kept.next_send = now + kept.lease_s / _RENEWALS_PER_LEASE
            until = min((kept.next_send for kept in self._kept.values()), default=None)
            if until is not None:
                until = min(until, now + _POLL_S)
        for (endpoint, pulling), tokens in renewals.items():
            for batch in _batches(tokens):
                sent[self._client.renew(endpoint, batch, self._answer_timeout_s, pulling)] = batch
        for endpoint, tokens in releases.items():
            for batch in _batches(tokens):
                sent[self._client.release(endpoint, batch, self._answer_timeout_s)] = batch
        return until

    def _hear(self, tokens: tuple[str, ...], stands: bool) -> None:
        """Silence is news only where nothing was known: a busy P may miss a renewal of a lease that stands."""
        now = time.monotonic()
        with self._lock:
            for token in tokens:
                if (kept := self._kept.get(token)) is not None:
                    kept.stands, kept.news_at = kept.stands or stands, now

    def _forget(self, tokens: tuple[str, ...]) -> None:
        with self._lock:
            for token in tokens:
                kept = self._kept.get(token)
                if kept is not None and kept.give_up:
                    del self._kept[token]

    def _forget_gone(self, tokens: tuple[str, ...]) -> None:
        """P no longer knows these leases: who has not begun to pull prefills here, a pull will not be confirmed."""
        with self._lock:
            for token in tokens:
                self._kept.pop(token, None)


def _batches(tokens: list[str]) -> list[tuple[str, ...]]:
    size = MAX_LEASES_PER_MESSAGE
    return [tuple(tokens[start : start + size]) for start in range(0, len(tokens), size)]
