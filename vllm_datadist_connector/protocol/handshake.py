"""Geometry: how one worker rank's KV cache lies in its registered caches, and whether two ranks can exchange blocks.

What must agree is the *layout contract*, never the vLLM version: rolling upgrades pair different versions. Everything
else (tensor and pipeline parallelism, block sizes, order of heads and tokens, grouping of layers) may differ: a block
is described down to the bytes of one token of one shard, and `worker/pairing.py` maps one description onto another.

A block is made of segments. A segment holds `count` of the model's `total` shards, at equal distances; a shard is what
tensor parallelism deals out (a KV head, a channel of a convolution; the one latent of MLA), and holds `lanes` times
`rows` rows at equal distances; a row is `row_bytes` bytes of `row_tokens` consecutive tokens:

    HND block [2 heads, 4 tokens, C]          one segment: shard_stride 4C, rows 4, row_stride C
    NHD block [4 tokens, 2 heads, C]          one segment: shard_stride C, rows 4, row_stride 2C
    K and V apart [2, 2 heads, 4 tokens, C]   two segments, the second at offset 8C
    K transposed by a CPU kernel              a lane per element of C, whose rows are that element of each token
    packed by a kernel in its own order       one row that holds all tokens of the block, and cannot be split
    state of a linear attention               no tokens: row_tokens 0, the block holds the state after the last token
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vllm_datadist_connector.protocol.contract import LayoutContract

MAX_BYTES: Final = 2**62
"""No offset into a cache may reach it: block ids times strides are computed in 64 bits."""

PLAIN: Final = "plain"
"""Packing of a KV cache whose tokens lie in rows of their own."""
K_TRANSPOSED: Final = "k-transposed"
"""Packing of a block's head as K of [elements, tokens], then V of [tokens, elements]."""
NZ: Final = "nz"
"""Packing of a latent in the NPU's tiles, in a tensor of the same shape. Any other name: not known."""

_Name = Annotated[str, msgspec.Meta(max_length=512)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Shards = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
_Ranks = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shards [first, first + count) of `total`, from `offset` bytes into the block on. Strides are bytes."""

    offset: _Bytes = 0
    total: _Shards = 1
    first: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    count: _Shards = 1
    shard_stride: _Bytes = 0
    lanes: _Shards = 1
    lane_stride: _Bytes = 0
    rows: _Shards = 1
    row_stride: _Bytes = 0
    row_bytes: _Count
    row_tokens: _Tokens


class View(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A registration of a cache's memory as blocks of `granule` bytes, beside others of the same memory.

    PullKvBlocks moves whole blocks of equal size on both sides: parts of a block move as blocks of a finer view.
    """

    granule: _Count
    cache_id: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    first: _Bytes = 0
    """Block of the view at which the cache begins: what is before it is another cache's, registered with it."""


class CacheLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Tensors of one stride class: same KV cache group, blocks and segments. Tensor i holds the KV of layers[i]."""

    group: Annotated[int, msgspec.Meta(ge=0, le=63)]
    """KV cache group whose block table indexes this cache."""
    num_blocks: _Count
    block_tokens: _Tokens
    """Tokens per block; 0: a block holds a state. The block table may count larger blocks, a whole multiple of it."""
    block_stride: _Count
    """Bytes from one block of a tensor to the next."""
    block_bytes: _Count
    """Bytes of a block that hold KV; what is left to block_stride is padding, or belongs to other layers."""
    segments: Annotated[tuple[Segment, ...], msgspec.Meta(min_length=1, max_length=16)]
    layers: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1, max_length=240)]
    views: Annotated[tuple[View, ...], msgspec.Meta(max_length=16)] = ()
    """For peers that pull; none where no peer may."""
    dtype: _Name = ""
    """Of the elements, where the layer's tensors tell more of it than the contract does; empty: they do not."""


class RankGeometry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a D rank must know of a P rank to link with it and to plan transfers."""

    tp_rank: Annotated[int, msgspec.Meta(ge=0, le=4095)]
    pp_rank: Annotated[int, msgspec.Meta(ge=0, le=4095)]
    tp_size: _Ranks
    pp_size: _Ranks
    cluster_id: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    """Of the engine's listener; 0 for a rank that does not listen (a pure consumer)."""
    contract: LayoutContract
    block_sizes: Annotated[tuple[_Tokens, ...], msgspec.Meta(min_length=1, max_length=64)]
    """Tokens per block of each KV cache group's block table; 0 for a group of states."""
    caches: Annotated[tuple[CacheLayout, ...], msgspec.Meta(max_length=4096)]
    pushes: bool = False
    """Whether the rank takes offers of a D's blocks to write into."""


def decode_geometry(data: bytes) -> RankGeometry:
    """A peer's RankGeometry.

    Raises:
        msgspec.ValidationError: it is malformed, or describes blocks outside of its own caches.
    """
    geometry = msgspec.msgpack.decode(data, type=RankGeometry)
    for index, cache in enumerate(geometry.caches):
        problem = _inconsistency(cache, len(geometry.block_sizes))
        if problem:
            raise msgspec.ValidationError(f"cache {index}: {problem}")
    return geometry


def _inconsistency(cache: CacheLayout, groups: int) -> str:
    """What is wrong with a layout in itself: offsets are computed from it, and must stay inside 64 bits."""
    if cache.group >= groups:
        return f"group {cache.group}, there are {groups}"
    if cache.block_bytes > cache.block_stride or cache.num_blocks * cache.block_stride > MAX_BYTES:
        return f"{cache.num_blocks} blocks of {cache.block_bytes} bytes at distances of {cache.block_stride}"
    for segment in cache.segments:
        if segment.first + segment.count > segment.total:
            return f"shards {segment.first}..{segment.first + segment.count - 1} of {segment.total}"
        if segment_end(segment) > cache.block_bytes:
            return f"a segment ends at byte {segment_end(segment)} of a block of {cache.block_bytes}"
        if not segment.row_tokens and cache.block_tokens:
            return f"a state in blocks of {cache.block_tokens} tokens"
        if segment.row_tokens * segment.rows != cache.block_tokens and segment.row_tokens:
            return f"{segment.rows} rows of {segment.row_tokens} tokens in blocks of {cache.block_tokens} tokens"
    return ""


def segment_end(segment: Segment) -> int:
    """The end of a segment's last byte, from the start of the block."""
    last_shard = segment.offset + (segment.count - 1) * segment.shard_stride
    last_lane = last_shard + (segment.lanes - 1) * segment.lane_stride
    return last_lane + (segment.rows - 1) * segment.row_stride + segment.row_bytes
