"""Who this instance is, and what its prompts are, in values that peers can compare."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.digest import PromptHash
from vllm_datadist_connector.scheduler.adapters import Adapters

if TYPE_CHECKING:
    from vllm.v1.request import Request


_adapters = Adapters()


@dataclass(frozen=True, slots=True)
class InstanceIdentity:
    """One life of one engine core (one data parallel rank)."""

    engine_id: str
    tp_size: int
    pp_size: int
    dcp_size: int
    groups: tuple[KVGroup, ...]
    incarnation: str = field(default_factory=lambda: secrets.token_hex(16))
    """Tells a restarted instance from the one that granted a lease, even at the same address with the same id."""


def is_token_prompt(request: Request) -> bool:
    """Whether the prompt digest tells all of the prompt: embeddings have no ids, or placeholders that hide them."""
    return bool(request.prompt_token_ids) and request.prompt_embeds is None


def adapter_of(request: Request) -> str:
    """Identity of the request's LoRA adapter; empty for none."""
    return _adapters.identity_of(request.lora_request)


def digest_of(
    request: Request, num_tokens: int, adapter: str, begun: PromptHash | None = None, num_begun: int = 0
) -> str:
    """The digest of a vLLM request's first `num_tokens` tokens, generated ones included.

    Args:
        begun: of the first `num_begun` of them, which it takes over; None: not yet known.
    """
    if begun is None:
        begun, num_begun = PromptHash(), 0
    if num_begun < num_tokens:
        begun.update(request.all_token_ids[num_begun:num_tokens])
    mm_hashes = [feature.identifier for feature in request.mm_features or () if feature.mm_position.offset < num_tokens]
    return begun.hexdigest(adapter, mm_hashes)
