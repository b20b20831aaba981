"""Digests of everything that decides a prompt's KV cache besides the weights, and of the blocks that hold it.

P puts them into the lease. D compares the prompt's with its own request's before it pulls, and both are part of the
confirmation: without them a client that sends one prompt to P and another to D, or changes the blocks on their way,
would put wrong KV into D's prefix cache, for every later user.

Native: a scheduler thread that converts long lists in Python, or gives up the GIL while it hashes them, has every
running request behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_datadist_connector._native import PendingHash, PromptHash, PromptHasher, blocks_digest, digest_and_count

__all__ = ["PendingHash", "PromptHash", "PromptHasher", "blocks_digest", "digest_and_count", "prompt_digest"]


def prompt_digest(token_ids: Sequence[int], adapter: str = "", mm_hashes: Sequence[str] = ()) -> str:
    whole = PromptHash()
    whole.update(token_ids)
    return whole.hexdigest(adapter, mm_hashes)
