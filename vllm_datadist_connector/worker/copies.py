"""OwnCopies: what a rank pulls from itself, on a thread of its own.

No engine links with itself, and a copy takes as long as its bytes do: on the driver thread it would keep everybody
else's completions and answers waiting.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vllm_datadist_connector import _native
from vllm_datadist_connector.worker.caches import RegisteredCaches
from vllm_datadist_connector.worker.plan import BlockPull


class OwnCopies:
    """One copy at a time, in order. submit(), cancel() and poll() never block; close() waits for the one that runs.

    Copies end in Completions as calls of the transfer queue do, under ids below 0: those are no ids of the queue's.
    """

    def __init__(self, caches: RegisteredCaches, ended: Callable[[], None]) -> None:
        """
        Args:
            ended: is called, on any thread, when there is something to poll().
        """
        self._caches = caches
        self._ended = ended
        self._thread = ThreadPoolExecutor(1, "datadist-copies")
        self._ids = itertools.count(-1, -1)
        self._waiting: dict[int, Future[None]] = {}
        self._completions: deque[_native.Completion] = deque()

    def submit(self, pull: BlockPull, deadline: float) -> int:
        """`deadline`, in time.monotonic(): a copy that has not ended then is given up."""
        copy_id = next(self._ids)
        self._waiting[copy_id] = self._thread.submit(self._run, copy_id, pull, deadline, time.monotonic())
        return copy_id

    def cancel(self, copy_id: int) -> bool:
        """True if the copy had not started: it completes as cancelled."""
        future = self._waiting.get(copy_id)
        if future is None or not future.cancel():
            return False
        self._complete(copy_id, _native.LLM_FAILED, "cancelled before it started", cancelled=True)
        return True

    def poll(self) -> list[_native.Completion]:
        completions = [self._completions.popleft() for _ in range(len(self._completions))]
        for completion in completions:
            self._waiting.pop(completion.id, None)
        return completions

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, copy_id: int, pull: BlockPull, deadline: float, submitted: float) -> None:
        started = time.monotonic()
        status, error, in_time = _native.LLM_SUCCESS, "", True
        try:
            in_time = self._caches.copy(pull, deadline)
        except Exception as fault:  # a copy that never completed would hold its request for ever
            status, error = _native.LLM_FAILED, f"{type(fault).__name__}: {fault}"
        if not in_time:
            status, error = _native.LLM_TIMEOUT, "the deadline passed before all was copied"
        times = (started - submitted, time.monotonic() - started)
        self._complete(copy_id, status, error, cancelled=not in_time, times=times)

    def _complete(
        self, copy_id: int, status: int, error: str, cancelled: bool, times: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self._completions.append(_native.Completion(copy_id, status, cancelled, error, *times))
        self._ended()
