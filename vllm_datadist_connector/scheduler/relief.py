"""Relief: when an instance gives leases up because it cannot go on with them.

    nothing runs, nothing is pulled, and the first request of the queue gets no blocks
       ├── blocks that we hold for our own requests, which wait behind it: their lease goes, they prefill here
       ├── leases that nobody has asked for yet
       └── leases of other instances, if we are a D as well: they may be waiting for us

A request that was asked about before, and wants only one block more, is at the head without vLLM's asking again: that
we take from its not moving.

Without it a busy instance that is P and D stands still: the D request that would take the blocks waits for blocks, and
keeps the lease alive while it waits; so do instances in a circle. A P that is no D leaves alone what a D has asked for:
that D does not need us to go on.

Leases go one by one, each time the blocks of the last one are back. Whoever reads them all the same is refused its
confirmation and computes them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.scheduler.producer import ProducerScheduler

logger = logging.getLogger(__name__)

_STEPS, _OWN_AFTER_S = 4, 0.02
"""So many steps in a row, and so long: in fewer, what earlier steps have begun may not have come back."""

_UNCLAIMED_AFTER_S = 0.5
"""A router takes less from P's answer to D's first word."""

_UNCLAIMED_AT_ONCE = 8
"""They come in crowds: conversations of a batch, prompts of a list."""

_OTHERS_AFTER_S = 1.0
"""Who is about to pull does so within that, or waits for blocks as we do."""

_UNASKED_AFTER_S = 1.0
"""A request may also wait for something else, a grammar, say."""


class Relief:
    """Belongs to the scheduler thread."""

    def __init__(
        self,
        producer: ProducerScheduler,
        consumer: ConsumerScheduler | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._producer = producer
        self._consumer = consumer
        self._clock = clock
        self._asked: str | None = None
        self._unfinished: set[str] = set()
        self._steps = 0
        self._since = 0.0

    def arrived(self, request_id: str) -> None:
        self._unfinished.add(request_id)

    def ended(self, request_id: str) -> None:
        self._unfinished.discard(request_id)

    def asked(self, request_id: str) -> None:
        """vLLM looks at the first request of its queue."""
        self._asked = request_id

    def allocated(self, request_id: str) -> None:
        if self._asked == request_id:
            self._asked = None

    def step(self, num_scheduled_tokens: int) -> None:
        """vLLM has scheduled a step: whoever was asked about and not allocated stands before a full cache."""
        head, self._asked = self._asked, None
        if num_scheduled_tokens or not self._unfinished or (self._consumer is not None and self._consumer.pulling()):
            self._steps = 0
            return
        now = self._clock()
        self._steps += 1
        if self._steps == 1:
            self._since = now
        stalled_s = now - self._since
        patience_s = _OWN_AFTER_S if head is not None else _UNASKED_AFTER_S
        if self._steps >= _STEPS and stalled_s >= patience_s and not self._producer.returning:
            self._give_up(head or "of before", stalled_s)

    def _give_up(self, head: str, stalled_s: float) -> None:
        table = self._producer.leases
        if self._consumer is not None and self._give_up_own(self._consumer, head):
            return
        count = table.revoke("unclaimed", _UNCLAIMED_AFTER_S, _UNCLAIMED_AT_ONCE)
        if not count and self._consumer is not None and stalled_s >= _OTHERS_AFTER_S:
            count = table.revoke("idle", _OTHERS_AFTER_S, 1)
        if count:
            logger.info("the KV cache is full of leases: gave up %d for request %s", count, head)

    def _give_up_own(self, consumer: ConsumerScheduler, head: str) -> bool:
        waiting = consumer.waiting_on_ourselves()
        if head in waiting:
            # Its blocks become its own by our prefix cache.
            waiting.remove(head)
            waiting.insert(0, head)
        for request_id in waiting:
            if self._producer.leases.revoke_idle(consumer.token_of(request_id)):
                consumer.lose_lease(request_id)
                logger.info("the KV cache is full: request %s is prefilled again, for request %s", request_id, head)
                return True
        return False
