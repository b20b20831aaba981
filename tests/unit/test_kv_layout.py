"""KV cache tensors to caches, with the shapes that vLLM and vllm-ascend really hand over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED, Segment
from vllm_datadist_connector.worker.kv_layout import (
    MAX_TENSORS_PER_CACHE,
    CacheSpec,
    KVCaches,
    KVMemory,
    LayoutError,
    describe_caches,
    find_memory,
)
from vllm_datadist_connector.worker.kv_spec import LayerKV, Shards, StateKV, StatePart, TokenKV

BLOCKS, HEADS, TOKENS, CONTENT = 6, 2, 16, 32
BLOCK_BYTES = HEADS * TOKENS * CONTENT * 2
ROW = CONTENT * 2
# TP rank 1 of two: heads 2 and 3 of four.
DENSE = TokenKV(0, TOKENS, heads=Shards(4, 2, HEADS), rank=Shards(2, 1, 1))


def tensor(blocks: int = BLOCKS) -> torch.Tensor:
    return torch.zeros(blocks, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)


def describe(kv_caches: KVCaches, kv: LayerKV = DENSE, num_blocks: int = BLOCKS) -> list[CacheSpec]:
    return describe_caches(kv_caches, dict.fromkeys(kv_caches, kv), num_blocks)


def heads(**changes: int) -> Segment:
    values = {
        "total": 4,
        "first": 2,
        "count": HEADS,
        "shard_stride": TOKENS * ROW,
        "rows": TOKENS,
        "row_stride": ROW,
        "row_bytes": ROW,
        "row_tokens": 1,
    }
    return Segment(**(values | changes))


def test_layers_in_the_order_of_their_numbers_whatever_the_dict_order() -> None:
    layers = {f"model.layers.{i}.self_attn": tensor() for i in (10, 2, 0)}
    (spec,) = describe(layers)
    assert spec.layout.layers == ("model.layers.0.self_attn", "model.layers.2.self_attn", "model.layers.10.self_attn")
    assert spec.addrs == tuple(layers[name].data_ptr() for name in spec.layout.layers)
    assert (spec.layout.num_blocks, spec.layout.block_bytes, spec.layout.block_tokens) == (BLOCKS, BLOCK_BYTES, TOKENS)
    assert spec.layout.segments == (heads(),)
    assert describe(dict(reversed(layers.items()))) == [spec]


def test_several_layers_in_one_storage() -> None:
    both = torch.zeros(2, BLOCKS, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)
    (spec,) = describe({"layers.0": both[0], "layers.1": both[1]})
    assert spec.addrs == (both.data_ptr(), both.data_ptr() + BLOCKS * BLOCK_BYTES)


def test_layers_packed_into_one_block() -> None:
    """Block-outermost layouts: a block has all layers' pages, one after another."""
    packed = torch.zeros(BLOCKS, 2, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)
    (spec,) = describe({"layers.0": packed[:, 0], "layers.1": packed[:, 1]})
    assert (spec.layout.block_stride, spec.layout.block_bytes) == (2 * BLOCK_BYTES, BLOCK_BYTES)
    assert spec.addrs == (packed.data_ptr(), packed.data_ptr() + BLOCK_BYTES)


def test_shared_layers_once() -> None:
    first = tensor()
    (spec,) = describe({"layers.1": first, "layers.0": tensor(), "layers.7": first})
    assert spec.layout.layers == ("layers.0", "layers.1")


def test_layers_of_different_groups_in_one_memory_are_both_there() -> None:
    """vLLM overlays its groups: a block id belongs to one of them at a time."""
    memory = tensor()
    layers: Mapping[str, LayerKV] = {"layers.0": DENSE, "layers.1": replace(DENSE, group=1)}
    specs = describe_caches({"layers.0": memory, "layers.1": memory}, layers, BLOCKS)
    assert [(spec.layout.group, spec.layout.layers, spec.addrs) for spec in specs] == [
        (0, ("layers.0",), (memory.data_ptr(),)),
        (1, ("layers.1",), (memory.data_ptr(),)),
    ]


def test_tokens_before_heads_in_memory() -> None:
    nhd = torch.zeros(BLOCKS, TOKENS, HEADS, CONTENT, dtype=torch.bfloat16).transpose(1, 2)
    (spec,) = describe({"layers.0": nhd})
    assert spec.layout.segments == (heads(shard_stride=ROW, row_stride=HEADS * ROW),)


def test_k_and_v_in_tensors_of_their_own() -> None:
    """vllm-ascend: each [blocks, tokens, heads, size]."""
    half = ROW // 2
    k, v = (torch.zeros(BLOCKS, TOKENS, HEADS, CONTENT // 2, dtype=torch.bfloat16) for _ in range(2))
    (spec,) = describe({"layers.0": (k, v)})
    assert spec.layout.layers == ("layers.0:0", "layers.0:1")
    assert spec.addrs == (k.data_ptr(), v.data_ptr())
    assert spec.layout.segments == (heads(shard_stride=half, row_stride=HEADS * half, row_bytes=half),)


def test_k_and_v_in_halves_of_a_block() -> None:
    """FlashAttention before 0.29: [blocks, 2, tokens, heads, size], heads first in memory."""
    half = ROW // 2
    logical = torch.zeros(BLOCKS, 2, HEADS, TOKENS, CONTENT // 2, dtype=torch.bfloat16).transpose(2, 3)
    (spec,) = describe({"layers.0": logical})
    own = {"shard_stride": TOKENS * half, "row_stride": half, "row_bytes": half}
    assert spec.layout.segments == (heads(**own), heads(**own, offset=BLOCK_BYTES // 2))


def test_parts_in_the_same_blocks_are_one() -> None:
    """Views of one storage, as FlashAttention's K and V would be if they came apart."""
    both = torch.zeros(BLOCKS, 2, TOKENS, HEADS, CONTENT // 2, dtype=torch.bfloat16)
    (spec,) = describe({"layers.0": [both[:, 0], both[:, 1]]})
    assert spec.layout.layers == ("layers.0",)
    assert [segment.offset for segment in spec.layout.segments] == [0, BLOCK_BYTES // 2]


def test_latent_without_a_head_dimension() -> None:
    kv = TokenKV(0, TOKENS, heads=Shards(1, 0, 1), rank=Shards(1, 0, 1))
    flat, with_one = torch.zeros(BLOCKS, TOKENS, 576), torch.zeros(BLOCKS, 1, TOKENS, 576)
    row = 576 * 4
    for each in (flat, with_one):
        (spec,) = describe({"layers.0": each}, kv)
        assert spec.layout.segments == (Segment(rows=TOKENS, row_stride=row, row_bytes=row, row_tokens=1),)


def test_rows_that_hold_several_tokens() -> None:
    """Compressed latents: four tokens to a row."""
    kv = TokenKV(0, TOKENS, heads=Shards(1, 0, 1), rank=Shards(1, 0, 1))
    (spec,) = describe({"layers.0": torch.zeros(BLOCKS, 1, TOKENS // 4, 8)}, kv)
    assert (spec.layout.segments[0].rows, spec.layout.segments[0].row_tokens) == (4, 4)


def test_transposed_k() -> None:
    (spec,) = describe({"layers.0": tensor()}, replace(DENSE, packing=K_TRANSPOSED))
    keys, values = spec.layout.segments
    assert (keys.lanes, keys.lane_stride, keys.row_bytes) == (CONTENT // 2, TOKENS * 2, 2)
    assert (values.offset, values.row_stride, values.row_bytes) == (TOKENS * ROW // 2, ROW // 2, ROW // 2)


def test_an_unknown_packing_keeps_a_heads_tokens_together() -> None:
    (spec,) = describe({"layers.0": tensor()}, replace(DENSE, packing="cpu-amx"))
    assert spec.layout.segments == (heads(rows=1, row_stride=0, row_bytes=TOKENS * ROW, row_tokens=TOKENS),)


def test_heads_that_no_dimension_counts_stay_together() -> None:
    kv = replace(DENSE, heads=Shards(16, 8, 8))
    (spec,) = describe({"layers.0": tensor()}, kv)
    assert spec.layout.segments == (Segment(total=2, first=1, count=1, row_bytes=BLOCK_BYTES, row_tokens=TOKENS),)


def test_kernel_blocks_finer_than_the_tables() -> None:
    (spec,) = describe({"layers.0": tensor(BLOCKS * 4)}, replace(DENSE, block_size=TOKENS * 4))
    assert (spec.layout.num_blocks, spec.layout.block_tokens, spec.layout.block_bytes) == (24, TOKENS, BLOCK_BYTES)


def test_one_cache_per_stride_class() -> None:
    wide = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * CONTENT, dtype=torch.bfloat16)
    layers: Mapping[str, LayerKV] = {
        "layers.0": DENSE,
        "layers.1": DENSE,
        "layers.2": replace(DENSE, group=1),
        "layers.3": DENSE,
    }
    kv_caches = {"layers.0": tensor(), "layers.1": wide, "layers.2": tensor(), "layers.3": tensor()}
    assert [
        (spec.layout.group, spec.layout.block_bytes, spec.layout.layers)
        for spec in describe_caches(kv_caches, layers, BLOCKS)
    ] == [
        (0, BLOCK_BYTES, ("layers.0", "layers.3")),
        (0, BLOCK_BYTES * 2, ("layers.1",)),
        (1, BLOCK_BYTES, ("layers.2",)),
    ]


def test_more_tensors_than_one_registration_takes() -> None:
    kv = TokenKV(0, 1, heads=Shards(1, 0, 1), rank=Shards(1, 0, 1))
    whole = torch.zeros(MAX_TENSORS_PER_CACHE + 1, BLOCKS, 1, 8, dtype=torch.uint8)
    specs = describe({f"layers.{i}": whole[i] for i in range(len(whole))}, kv)
    assert [len(spec.addrs) for spec in specs] == [MAX_TENSORS_PER_CACHE, 1]
    assert specs[1].layout.layers == (f"layers.{MAX_TENSORS_PER_CACHE}",)


def test_a_layer_that_does_not_cross_instances_is_left_out() -> None:
    (spec,) = describe_caches({"layers.0": tensor(), "hot": torch.zeros(3)}, {"layers.0": DENSE}, BLOCKS)
    assert spec.layout.layers == ("layers.0",)


class TestStates:
    CONVOLUTION = StatePart((3, 8), 2, axis=1, cuts=(Shards(4, 2, 2), Shards(4, 2, 2), Shards(8, 4, 4)))
    HEADS = StatePart((2, 4, 4), 4, axis=0, cuts=(Shards(4, 2, 2),))
    STATE = StateKV(1, (CONVOLUTION, HEADS))
    BYTES = 3 * 8 * 2 + 2 * 4 * 4 * 4

    def test_in_one_padded_block(self) -> None:
        """vLLM 0.29 and later: bytes, the parts one after the other, up to the page of the attention layers."""
        pages = torch.zeros(BLOCKS, 1, 1, 256, dtype=torch.int8)
        (spec,) = describe({"layers.0": pages[..., : self.BYTES]}, self.STATE)
        layout = spec.layout
        assert (layout.block_tokens, layout.block_stride, layout.block_bytes) == (0, 256, self.BYTES)
        q, k, v, state = layout.segments
        assert [each.offset for each in layout.segments] == [0, 4, 8, 48]
        assert (q.total, q.first, q.count, q.shard_stride, q.rows, q.row_stride, q.row_bytes) == (4, 2, 2, 2, 3, 16, 2)
        assert (k.total, v.total, v.count) == (4, 8, 4)
        assert (state.count, state.shard_stride, state.rows, state.row_bytes, state.row_tokens) == (2, 64, 1, 64, 0)

    def test_a_tensor_for_each_part_of_a_page(self) -> None:
        """vLLM before: a list of views into the page. The layout is the same."""
        pages = torch.zeros(BLOCKS, 256, dtype=torch.int8)
        convolution = pages[:, :48].view(torch.bfloat16).unflatten(1, (3, 8))
        heads = pages[:, 48 : self.BYTES].view(torch.float32).unflatten(1, (2, 4, 4))
        specs = describe({"layers.0": [convolution, heads]}, self.STATE)
        assert specs == describe({"layers.0": pages[:, None, None, : self.BYTES]}, self.STATE)

    def test_parts_that_were_allocated_apart(self) -> None:
        """vllm-ascend."""
        parts = [torch.zeros(BLOCKS, 3, 8, dtype=torch.bfloat16), torch.zeros(BLOCKS, 2, 4, 4)]
        first, second = describe({"layers.0": parts}, self.STATE)
        assert (first.layout.layers, second.layout.layers) == (("layers.0:0",), ("layers.0:1",))
        assert (first.layout.block_bytes, second.layout.block_bytes) == (48, 128)

    def test_channels_before_tokens_is_the_same_but_for_the_strides(self) -> None:
        dim_first = replace(self.CONVOLUTION, shape=(8, 3), axis=0)
        (spec,) = describe({"layers.0": torch.zeros(BLOCKS, 48, dtype=torch.int8)}, StateKV(1, (dim_first,)))
        q = spec.layout.segments[0]
        assert (q.count, q.shard_stride, q.rows, q.row_stride, q.row_bytes) == (2, 6, 3, 2, 2)

    @pytest.mark.parametrize(
        "value",
        [
            torch.zeros(BLOCKS, BYTES - 1, dtype=torch.int8),
            torch.zeros(BLOCKS, 2 * BYTES, dtype=torch.int8)[:, ::2],
            [torch.zeros(BLOCKS, 24, dtype=torch.bfloat16)],
            [torch.zeros(BLOCKS, 24, dtype=torch.bfloat16), torch.zeros(BLOCKS, 31)],
            [torch.zeros(BLOCKS, 1)] * 3,
        ],
    )
    def test_refused(self, value: torch.Tensor | list[torch.Tensor]) -> None:
        with pytest.raises(LayoutError, match=r"layer 'layers\.0'"):
            describe({"layers.0": value}, self.STATE)


REFUSED: dict[str, torch.Tensor] = {
    "K and V in the first dimension": torch.zeros(2, BLOCKS, HEADS, TOKENS, CONTENT),
    "not a multiple of the blocks": tensor(BLOCKS + 1),
    "no block": tensor(0),
    "one dimension": torch.zeros(BLOCKS),
    "bytes of a row apart": torch.zeros(BLOCKS, HEADS, CONTENT, TOKENS).transpose(2, 3),
    "rows that do not divide the block": torch.zeros(BLOCKS, HEADS, 5, CONTENT),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_layer_and_shape(value: torch.Tensor) -> None:
    with pytest.raises(LayoutError, match=r"layer 'layers\.5'.*shape \(\d+"):
        describe({"layers.5": value})


def test_packed_tokens_apart() -> None:
    nhd = torch.zeros(BLOCKS, TOKENS, HEADS, CONTENT).transpose(1, 2)
    with pytest.raises(LayoutError, match="packed tokens of a head are not one run"):
        describe({"layers.0": nhd}, replace(DENSE, packing="cpu-amx"))


def test_no_tensor() -> None:
    with pytest.raises(LayoutError, match=r"'layers\.0': no KV cache tensor"):
        describe({"layers.0": []})
    with pytest.raises(LayoutError, match=r"'layers\.1' has no KV cache tensor"):
        describe_caches({"layers.0": tensor()}, {"layers.0": DENSE, "layers.1": DENSE}, BLOCKS)


# ---- where it is ----


def test_memory_of_the_host_and_of_a_device() -> None:
    layers = {"layers.0": DENSE, "layers.1": DENSE}
    here, there = tensor(), torch.zeros(BLOCKS, HEADS, TOKENS, CONTENT, device="meta")
    assert find_memory({"layers.0": here, "layers.1": (here,)}, layers, True, False) == KVMemory("cpu", 0)
    assert find_memory({"layers.0": there, "layers.1": there}, layers, False, True).kind == "meta"
    assert find_memory({"layers.0": here, "elsewhere": there}, layers, True, False).is_host, "a layer that stays here"
    with pytest.raises(LayoutError, match=r"layer 'layers\.1'.* is on meta; this provider moves host memory$"):
        find_memory({"layers.0": here, "layers.1": there}, layers, True, False)
    with pytest.raises(LayoutError, match=r"layer 'layers\.0'.* is on cpu; this provider moves device memory$"):
        find_memory({"layers.0": here}, layers, False, True)
    with pytest.raises(LayoutError, match=r"on several devices: layer 'layers\.0' on cpu:0, layer 'layers\.1' on meta"):
        find_memory({"layers.0": here, "layers.1": there}, layers, True, True)


def test_caches_are_no_larger_than_a_provider_takes() -> None:
    tensors = {f"layers.{i}": tensor() for i in range(5)}
    specs = describe_caches(tensors, dict.fromkeys(tensors, DENSE), BLOCKS, max_tensors=2)
    assert [len(spec.addrs) for spec in specs] == [2, 2, 1]


def test_elements_are_told_where_the_specification_does_not() -> None:
    """vllm-ascend's index has other elements than the latent, and so have its scales."""
    latent, index, scales = (
        torch.zeros(BLOCKS, TOKENS, 1, size, dtype=dtype)
        for size, dtype in ((512, torch.bfloat16), (128, torch.int8), (1, torch.float16))
    )
    kv = TokenKV(0, TOKENS, heads=Shards(1, 0, 1), rank=Shards(1, 0, 1))
    assert [spec.layout.dtype for spec in describe({"layers.0": (latent, index, scales)}, kv)] == [
        "bfloat16",
        "int8",
        "float16",
    ]
    assert describe({"layers.0": tensor()})[0].layout.dtype == ""
    both = torch.zeros(BLOCKS, TOKENS, 1, 130, dtype=torch.int8)
    (spec,) = describe({"layers.0": [both[..., :128], both[..., 128:].view(torch.float16)]}, kv)
    assert spec.layout.dtype == "int8+float16"


class TestCoveredParts:
    def test_a_view_over_others_is_left_out(self) -> None:
        pages = torch.zeros(BLOCKS, 128, dtype=torch.int8)
        index, scales = (pages[:, at : at + TOKENS * n].unflatten(1, (TOKENS, 1, n)) for at, n in ((0, 4), (64, 2)))
        whole = pages[:, : TOKENS * 6].unflatten(1, (TOKENS, 1, 6))
        kv = TokenKV(0, TOKENS, heads=Shards(1, 0, 1), rank=Shards(1, 0, 1))
        assert describe({"layers.0": [index, scales, whole]}, kv) == describe({"layers.0": [index, scales]}, kv)
        (spec,) = describe({"layers.0": [index, whole]}, kv)
        assert len(spec.layout.segments) == 2, "it has bytes of its own"

    def test_parts_side_by_side_in_each_token_are_kept(self) -> None:
        both = torch.zeros(BLOCKS, TOKENS, 1, 8, dtype=torch.int8)
        kv = TokenKV(0, TOKENS, heads=Shards(1, 0, 1), rank=Shards(1, 0, 1))
        (spec,) = describe({"layers.0": [both[..., :4], both[..., 4:]]}, kv)
        assert [segment.offset for segment in spec.layout.segments] == [0, 4]
