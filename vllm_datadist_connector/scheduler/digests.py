"""PromptDigests: what grows with the length of a prompt, beside the scheduler thread.

The digest of a hundred thousand tokens takes most of a millisecond, and every running request waits while the scheduler
thread computes it. A P begins with it when the request arrives, long before its prefill is done; a D lets a request
wait whose prompt is long enough for that. What is left here is a copy of the list, a few per cent of what vLLM does for
the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm_datadist_connector.protocol.digest import PendingHash, PromptHasher
from vllm_datadist_connector.scheduler.identity import digest_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

INLINE_TOKENS = 4096
"""A twentieth of a millisecond at most, which nobody is spared for."""


class _Begun(NamedTuple):
    hash: PendingHash
    num_tokens: int


class PromptDigests:
    """All members belong to the scheduler thread; the native thread behind them starts with the first long prompt."""

    def __init__(self, inline_tokens: int = INLINE_TOKENS) -> None:
        """
        Args:
            inline_tokens: digests of no more are computed where they are taken.
        """
        self._inline_tokens = inline_tokens
        self._begun: dict[str, _Begun] = {}
        self._hasher = PromptHasher()

    def begin(self, request: Request, num_tokens: int) -> bool:
        """Of the prompt's first `num_tokens` tokens, or of as many as there are. True: the digest costs little now."""
        token_ids = request.prompt_token_ids or []
        num_tokens = min(num_tokens, len(token_ids))
        if num_tokens <= self._inline_tokens:
            return True
        self._begun[request.request_id] = _Begun(self._hasher.begin(token_ids, num_tokens), num_tokens)
        return False

    def is_ready(self, request_id: str) -> bool:
        """Whether the digest costs little now."""
        begun = self._begun.get(request_id)
        return begun is None or begun.hash.done

    def take(self, request: Request, num_tokens: int, adapter: str) -> str:
        """The digest of the request's first `num_tokens` tokens, generated ones included. Waits for nothing."""
        begun = self._begun.pop(request.request_id, None)
        if begun is None or begun.num_tokens > num_tokens:
            return digest_of(request, num_tokens, adapter)
        return digest_of(request, num_tokens, adapter, begun.hash.take(), begun.num_tokens)

    def forget(self, request_id: str) -> None:
        self._begun.pop(request_id, None)

    def close(self) -> None:
        self._hasher.close()
