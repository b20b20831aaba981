"""KV cache groups as scheduler and workers see them: how a block table of each relates to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec

from vllm_datadist_connector import compat
from vllm_datadist_connector.config import ConfigError


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a block table."""

    block_size: int
    """Tokens per block; 0: a group of states (Mamba, linear attention), with one block that holds the latest state."""
    scratch_blocks: int = 0
    """Blocks at the end of a state's table that belong to speculative tokens."""
    has_window: bool = False
    """Blocks of tokens that the next one does not look back on any more are given back."""

    @property
    def is_state(self) -> bool:
        return self.block_size == 0

    @property
    def forgets(self) -> bool:
        """What was computed up to one token cannot serve a request that goes on from an earlier one."""
        return self.is_state or self.has_window

    def holding(self, table: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The blocks of a request's table that hold the KV of its first `num_tokens` tokens.

        Blocks beyond them (speculative look-ahead, which vLLM 0.23 hands over too) hold nothing.
        """
        if not self.is_state:
            end = -(-num_tokens // self.block_size)
            return tuple(table if len(table) <= end else table[:end])
        return tuple(table[: max(1, len(table) - self.scratch_blocks)][-1:])

    def covering(self, table: Sequence[int], first_token: int, end_token: int) -> tuple[int, ...]:
        """The blocks of a request's table in which tokens [first_token, end_token) lie."""
        held = self.holding(table, end_token)
        return held if self.is_state else held[first_token // self.block_size :]


def describe_groups(groups: Sequence[Any]) -> tuple[KVGroup, ...]:
    """Of vLLM's KVCacheGroupSpecs.

    Raises:
        ConfigError: a group's kind of KV cache is not known, so nobody could say which of its blocks hold what.
    """
    described = []
    for group in groups:
        # A pipeline stage may have no layer of a group; it keeps the group's number all the same.
        first = next(iter(group.layer_names), "")
        spec = compat.layer_spec(group.kv_cache_spec, first)
        if isinstance(spec, MambaSpec):
            described.append(KVGroup(0, int(getattr(spec, "num_speculative_blocks", 0))))
        elif compat.tokens_per_entry(spec) > 1:
            raise ConfigError(
                f"KV cache of layer {first!r}: latents of {compat.tokens_per_entry(spec)} tokens each (DeepSeek V4 with"
                " vllm-ascend) are not supported"
            )
        elif isinstance(spec, AttentionSpec):
            has_window = isinstance(spec, (SlidingWindowSpec, ChunkedLocalAttentionSpec))
            described.append(KVGroup(int(group.kv_cache_spec.block_size), has_window=has_window))
        else:
            raise ConfigError(
                f"KV cache of layer {first!r}: {type(spec).__name__} is not supported; "
                "supported are attention and Mamba specifications"
            )
    return tuple(described)
