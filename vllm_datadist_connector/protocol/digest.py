"""Digest of everything that decides a prompt's KV cache besides the weights.

P puts it into the lease, D compares it with its own request's before it pulls and again when it confirms. Without it a
client that sends one prompt to P and another to D would put wrong KV into D's prefix cache, for every later user.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence


def prompt_digest(token_ids: Sequence[int], lora_name: str | None = None, mm_hashes: Sequence[str] = ()) -> str:
    """32 hex digits of token ids, LoRA adapter and multi-modal content hashes (in prompt order)."""
    tokens = array("q", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    state = hashlib.blake2b(tokens, digest_size=16)
    for part in (lora_name or "", *mm_hashes):
        encoded = part.encode(errors="surrogatepass")
        state.update(len(encoded).to_bytes(4, "little"))
        state.update(encoded)
    return state.hexdigest()
