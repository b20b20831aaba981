"""Digests of everything that decides a prompt's KV cache besides the weights, and of the blocks that hold it.

P puts them into the lease. D compares the prompt's with its own request's before it pulls, and both are part of the
confirmation: without them a client that sends one prompt to P and another to D, or changes the blocks on their way,
would put wrong KV into D's prefix cache, for every later user.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from vllm_datadist_connector.protocol.params import BlockIds


class PromptHash:
    """The digest of a prompt that is read in pieces."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def update(self, token_ids: Sequence[int]) -> None:
        self._state.update(_words(token_ids))

    def copy(self) -> PromptHash:
        other = PromptHash()
        other._state = self._state.copy()
        return other

    def hexdigest(self, adapter: str = "", mm_hashes: Sequence[str] = ()) -> str:
        """32 hex digits of token ids, LoRA adapter and multi-modal content hashes (in prompt order)."""
        state = self._state.copy()
        for part in (adapter, *mm_hashes):
            encoded = part.encode(errors="surrogatepass")
            state.update(len(encoded).to_bytes(4, "little"))
            state.update(encoded)
        return state.hexdigest()


def prompt_digest(token_ids: Sequence[int], adapter: str = "", mm_hashes: Sequence[str] = ()) -> str:
    whole = PromptHash()
    whole.update(token_ids)
    return whole.hexdigest(adapter, mm_hashes)


def blocks_digest(blocks: BlockIds) -> str:
    """32 hex digits of all blocks that the params name, in their order."""
    state = hashlib.blake2b(digest_size=16)
    for group in blocks:
        state.update(len(group).to_bytes(4, "little"))
        state.update(_words(group))
    return state.hexdigest()


def _words(values: Sequence[int]) -> array[int]:
    words = array("q", values)
    if sys.byteorder == "big":
        words.byteswap()
    return words
