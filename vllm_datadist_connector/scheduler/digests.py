"""PromptDigests: what grows with the length of a prompt, beside the scheduler thread.

The digest of a hundred thousand tokens takes milliseconds, and every running request waits while the scheduler thread
computes it. A P begins with it when the request arrives, long before its prefill is done; a D lets its request wait.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_datadist_connector.protocol.digest import PromptHash
from vllm_datadist_connector.scheduler.identity import digest_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

INLINE_TOKENS = 4096
"""Not worth a thread: a tenth of a millisecond."""

_PIECE = 2048
"""Between pieces the scheduler thread gets the interpreter."""


@dataclass(slots=True)
class _Work:
    token_ids: list[int]
    num_tokens: int
    done: PromptHash | None = None
    dropped: bool = False


class PromptDigests:
    """All members belong to the scheduler thread; the thread behind them starts with the first long prompt."""

    def __init__(self) -> None:
        self._works: dict[str, _Work] = {}
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, request: Request, num_tokens: int) -> None:
        """Of the prompt's first `num_tokens` tokens, or of as many as there are."""
        token_ids = request.prompt_token_ids or []
        num_tokens = min(num_tokens, len(token_ids))
        if num_tokens <= INLINE_TOKENS:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="datadist-prompt-digests", daemon=True)
            self._thread.start()
        work = self._works[request.request_id] = _Work(token_ids, num_tokens)
        self._queue.put(work)

    def is_ready(self, request_id: str) -> bool:
        """Whether the digest costs little now."""
        work = self._works.get(request_id)
        return work is None or work.done is not None

    def take(self, request: Request, num_tokens: int, adapter: str) -> str:
        """The digest of the request's first `num_tokens` tokens, generated ones included. Waits for nothing."""
        work = self._works.get(request.request_id)
        self.forget(request.request_id)
        if work is None or work.done is None or work.num_tokens > num_tokens:
            return digest_of(request, num_tokens, adapter)
        return digest_of(request, num_tokens, adapter, work.done, work.num_tokens)

    def forget(self, request_id: str) -> None:
        work = self._works.pop(request_id, None)
        if work is not None:
            work.dropped = True

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=2.0)
            self._thread = None

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            whole = PromptHash()
            for start in range(0, work.num_tokens, _PIECE):
                if work.dropped:
                    break
                whole.update(work.token_ids[start : min(start + _PIECE, work.num_tokens)])
            work.done = whole
