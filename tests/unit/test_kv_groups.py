"""KVGroup: which blocks of a table hold which tokens; and what vLLM's groups are to us."""

from __future__ import annotations

import pytest
import torch
from support.engine_config import FULL, WINDOW, group_of
from support.engine_config import STATE as STATE_SPEC
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
)

from vllm_datadist_connector.config import ConfigError
from vllm_datadist_connector.kv_groups import KVGroup, describe_groups

TABLE = (7, 3, 5, 9, 8)
TOKENS, STATE, SPECULATIVE = KVGroup(16), KVGroup(0), KVGroup(0, scratch_blocks=2)

CHUNKED = ChunkedLocalAttentionSpec(
    block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float16, attention_chunk_size=64
)


@pytest.mark.parametrize(
    ("num_tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (48, 3), (49, 4), (80, 5), (81, 5)]
)
def test_tokens_held(num_tokens: int, blocks: int) -> None:
    assert TOKENS.holding(TABLE, num_tokens) == TABLE[:blocks]
    assert TOKENS.holding(list(TABLE), num_tokens) == TABLE[:blocks], "a tuple, whatever vLLM's table is"


@pytest.mark.parametrize(
    ("first", "end", "blocks"), [(0, 80, (0, 5)), (0, 33, (0, 3)), (16, 33, (1, 3)), (31, 33, (1, 3)), (32, 33, (2, 3))]
)
def test_tokens_covered(first: int, end: int, blocks: tuple[int, int]) -> None:
    assert TOKENS.covering(TABLE, first, end) == TABLE[slice(*blocks)]


def test_null_blocks_keep_their_places() -> None:
    table = (0, 0, 5, 9)
    assert TOKENS.holding(table, 60) == table
    assert TOKENS.covering(table, 16, 60) == (0, 5, 9)


@pytest.mark.parametrize(
    ("group", "table", "block"),
    [
        (STATE, (7,), 7),
        (STATE, (0, 0, 7), 7),
        (SPECULATIVE, (7, 11, 12), 7),
        (SPECULATIVE, (0, 0, 7, 11, 12), 7),
        (SPECULATIVE, (7,), 7),
        (SPECULATIVE, (7, 11), 7),
    ],
)
def test_a_state_is_one_block_that_is_not_scratch(group: KVGroup, table: tuple[int, ...], block: int) -> None:
    assert group.holding(table, 1000) == group.covering(table, 500, 1000) == (block,)


@pytest.mark.parametrize("group", [TOKENS, STATE, SPECULATIVE])
def test_an_empty_table_holds_nothing(group: KVGroup) -> None:
    assert group.holding((), 10) == group.covering((), 0, 10) == ()


def test_groups_of_vllm() -> None:
    speculative = MambaSpec(block_size=512, shapes=((4, 3),), dtypes=(torch.float16,), num_speculative_blocks=3)
    large = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=8, dtype=torch.float16)
    groups = [
        group_of(large, "a", "b"),
        group_of(WINDOW, "c"),
        group_of(STATE_SPEC, "d"),
        group_of(speculative, "e"),
        group_of(CHUNKED, "f"),
    ]
    assert describe_groups(groups) == (
        KVGroup(32),
        KVGroup(16, has_window=True),
        KVGroup(0),
        KVGroup(0, scratch_blocks=3),
        KVGroup(16, has_window=True),
    )


def test_a_stage_without_a_layer_keeps_the_group() -> None:
    assert describe_groups([group_of(FULL), group_of(STATE_SPEC, "d")]) == (KVGroup(16), KVGroup(0))


def test_an_unknown_kind_of_cache_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="layer 'odd': KVCacheSpec is not supported"):
        describe_groups([group_of(FULL, "a"), group_of(KVCacheSpec(block_size=16), "odd")])


class AscendLatents(MLAAttentionSpec):
    """As vllm-ascend's: a block counts entries, each of several tokens."""

    compress_ratio = 4


def test_latents_of_several_tokens_are_refused_where_blocks_count_entries() -> None:
    spec = AscendLatents(block_size=128, num_kv_heads=1, head_size=64, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"^KV cache of layer 'a': latents of 4 tokens each \(DeepSeek V4"):
        describe_groups([group_of(spec, "a")])
