"""A model's KV cache on any number of ranks, in any memory order: real tensors, written and read by token and head.

The oracle of the planning tests. What lies where in memory is torch's business (logical indices into permuted views);
the code under test sees only what vLLM would hand over: tensors, and what each layer's KV is made of.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_datadist_connector.protocol.contract import LayoutContract
from vllm_datadist_connector.protocol.handshake import (
    K_TRANSPOSED,
    PLAIN,
    CacheLayout,
    RankGeometry,
    View,
)
from vllm_datadist_connector.worker.granules import granules_of
from vllm_datadist_connector.worker.kv_layout import CacheSpec, describe_caches
from vllm_datadist_connector.worker.kv_spec import LayerKV, Shards, StateKV, StatePart, TokenKV
from vllm_datadist_connector.worker.plan import BlockPull

CONTRACT = LayoutContract(
    model="Model", kv_cache_dtype="torch.uint8", kv_packing=PLAIN, software="", settings={}, weights=""
)
_VIEWS = 1 << 24
"""Cache ids tell which cache, and in blocks of how many bytes."""
FORMS = ("one tensor", "K and V", "K and V in one")


@dataclass(frozen=True)
class Attention:
    """`heads` KV heads (or the one latent of MLA) with `content` bytes per token and head."""

    name: str
    group: int
    heads: int
    content: int


@dataclass(frozen=True)
class Linear:
    """A gated delta net: a convolution over Q, K, V and a state per value head. Sizes of the whole model."""

    name: str
    group: int
    keys: int
    values: int
    value_heads: int
    width: int = 3
    head_bytes: int = 4


Layer = Attention | Linear


@dataclass(frozen=True)
class Side:
    """How one instance keeps a model's KV cache."""

    tp: int
    pp: int
    block_sizes: tuple[int, ...]
    """Tokens per block of each group; 0: states."""
    num_blocks: int
    kernel_ratio: int = 1
    form: str = FORMS[0]
    heads_first: bool = True
    """Heads before tokens in memory."""
    packing: str = PLAIN
    padding: int = 0
    channels_first: bool = True


@dataclass
class Rank:
    tp_rank: int
    pp_rank: int
    side: Side
    layers: dict[str, Layer]
    tensors: dict[str, torch.Tensor | list[torch.Tensor]] = field(default_factory=dict)
    specs: list[CacheSpec] = field(default_factory=list)

    def heads(self, total: int) -> range:
        distinct = min(total, self.side.tp)
        count = total // distinct
        first = self.tp_rank * distinct // self.side.tp * count
        return range(first, first + count)

    def geometry(self, num_groups: int) -> RankGeometry:
        caches = []
        for index, spec in enumerate(self.specs):
            views = tuple(View(granule=g, cache_id=_VIEWS * index + g) for g in granules_of(spec.layout))
            values = {name: getattr(spec.layout, name) for name in CacheLayout.__struct_fields__}
            caches.append(CacheLayout(**(values | {"views": views})))
        return RankGeometry(
            tp_rank=self.tp_rank,
            pp_rank=self.pp_rank,
            tp_size=self.side.tp,
            pp_size=self.side.pp,
            cluster_id=1,
            host="127.0.0.1",
            port=1,
            contract=CONTRACT,
            block_sizes=self.side.block_sizes[:num_groups],
            caches=tuple(caches),
        )


def make_ranks(layers: Sequence[Layer], side: Side) -> list[Rank]:
    """Every rank of an instance, with zeroed memory; pipeline stages take the layers in order."""
    per_stage = -(-len(layers) // side.pp)
    ranks = []
    for pp_rank in range(side.pp):
        own = layers[pp_rank * per_stage : (pp_rank + 1) * per_stage]
        for tp_rank in range(side.tp):
            rank = Rank(tp_rank, pp_rank, side, {layer.name: layer for layer in own})
            for layer in own:
                rank.tensors[layer.name] = _allocate(rank, layer)
            # In an order of no meaning: layers are found by name.
            shuffled = dict(sorted(rank.tensors.items(), key=lambda item: _number(item[0])))
            rank.specs = describe_caches(shuffled, _describe(rank), side.num_blocks) if own else []
            ranks.append(rank)
    return ranks


def _describe(rank: Rank) -> Mapping[str, LayerKV]:
    side, described = rank.side, {}
    for layer in rank.layers.values():
        kv: LayerKV
        if isinstance(layer, Attention):
            heads, distinct = rank.heads(layer.heads), min(layer.heads, side.tp)
            kv = TokenKV(
                layer.group,
                side.block_sizes[layer.group],
                Shards(layer.heads, heads.start, len(heads)),
                Shards(distinct, rank.tp_rank * distinct // side.tp, 1),
                packing=side.packing,
            )
        else:
            cuts = tuple(
                Shards.of(width // side.tp, rank.tp_rank, side.tp) for width in (layer.keys, layer.keys, layer.values)
            )
            channels = sum(cut.count for cut in cuts)
            shape = (channels, layer.width) if side.channels_first else (layer.width, channels)
            heads_here = layer.value_heads // side.tp
            parts = (
                StatePart(shape, 2, 0 if side.channels_first else 1, cuts),
                StatePart((heads_here, layer.head_bytes), 1, 0, (Shards.of(heads_here, rank.tp_rank, side.tp),)),
            )
            kv = StateKV(layer.group, parts)
        described[layer.name] = kv
    return described


def _allocate(rank: Rank, layer: Layer) -> torch.Tensor | list[torch.Tensor]:
    side = rank.side
    if isinstance(layer, Linear):
        channels = (2 * layer.keys + layer.values) // side.tp
        size = channels * layer.width * 2 + layer.value_heads // side.tp * layer.head_bytes
        return _blocks(side.num_blocks, (size,), (0,), side.padding)
    blocks, heads = side.num_blocks * side.kernel_ratio, len(rank.heads(layer.heads))
    tokens = side.block_sizes[layer.group] // side.kernel_ratio
    if side.form == "one tensor":
        order = (0, 1, 2) if side.heads_first else (1, 0, 2)
        return _blocks(blocks, (heads, tokens, layer.content), order, side.padding)
    half = layer.content // 2
    if side.form == "K and V":
        order = (1, 0, 2) if side.heads_first else (0, 1, 2)
        return [_blocks(blocks, (tokens, heads, half), order, side.padding) for _ in range(2)]
    order4 = (0, 2, 1, 3) if side.heads_first else (0, 1, 2, 3)
    return _blocks(blocks, (2, tokens, heads, half), order4, side.padding)


def _blocks(count: int, shape: tuple[int, ...], order: tuple[int, ...], padding: int) -> torch.Tensor:
    """[count, *shape] bytes, a block's dimensions in memory in the given order, with padding after each block."""
    size = int(np.prod(shape))
    raw = torch.zeros(count, size + padding, dtype=torch.uint8)
    physical = raw[:, :size].unflatten(1, [shape[dim] for dim in order])
    inverse = [1 + order.index(dim) for dim in range(len(shape))]
    return physical.permute(0, *inverse)


def _number(key: object) -> int:
    return zlib.crc32(repr(key).encode())


# ---- content by meaning ----


def token_rows(rank: Rank, layer: Attention, head: int, block: int, slot: int) -> list[torch.Tensor]:
    """The bytes (views) of one token of one head: K and V together or one after the other."""
    tensors = rank.tensors[layer.name]
    at = head - rank.heads(layer.heads).start
    kernel_tokens = rank.side.block_sizes[layer.group] // rank.side.kernel_ratio
    kernel_block = block * rank.side.kernel_ratio + slot // kernel_tokens
    slot %= kernel_tokens
    if isinstance(tensors, list):
        return [each[kernel_block, slot, at] for each in tensors]
    if rank.side.packing == K_TRANSPOSED:
        head_bytes = tensors[kernel_block, at].flatten()
        keys, values = head_bytes.chunk(2)
        return [keys.view(-1, kernel_tokens)[:, slot], values.view(kernel_tokens, -1)[slot]]
    if rank.side.form == "one tensor":
        return [tensors[kernel_block, at, slot]]
    return [tensors[kernel_block, half, slot, at] for half in range(2)]


def state_rows(rank: Rank, layer: Linear, block: int) -> Iterator[tuple[tuple[str, int], torch.Tensor]]:
    """(what, bytes) of one block of a state: every channel and every value head that this rank has."""
    tensor = rank.tensors[layer.name]
    assert isinstance(tensor, torch.Tensor)
    tp = rank.side.tp
    channels = (2 * layer.keys + layer.values) // tp
    convolution = tensor[block, : channels * layer.width * 2]
    shape = (channels, layer.width, 2) if rank.side.channels_first else (layer.width, channels, 2)
    by_channel = convolution.view(shape) if rank.side.channels_first else convolution.view(shape).transpose(0, 1)
    at = 0
    for name, width in (("Q", layer.keys), ("K", layer.keys), ("V", layer.values)):
        for local in range(width // tp):
            yield (name, rank.tp_rank * (width // tp) + local), by_channel[at]
            at += 1
    heads = tensor[block, channels * layer.width * 2 :].view(-1, layer.head_bytes)
    for local in range(len(heads)):
        yield ("head", rank.tp_rank * len(heads) + local), heads[local]


def noise(*key: object, size: int) -> torch.Tensor:
    """Bytes that belong to a key, the same on every rank."""
    return torch.from_numpy(np.random.default_rng(_number(key)).integers(1, 256, size, dtype=np.uint8))


# ---- the engine, as the API describes it ----


class Engine:
    """PullKvBlocks between two ranks' memories, counting writes."""

    def __init__(self, dst: Rank) -> None:
        self.dst = dst
        self.writes = {addr: np.zeros(_length(spec), np.uint8) for spec in dst.specs for addr in spec.addrs}

    def pull(self, src: Rank, pull: BlockPull) -> None:
        index, granule = divmod(pull.src_cache_id, _VIEWS)
        assert granule == pull.granule
        src_spec, dst_spec = src.specs[index], self.dst.specs[pull.dst_index]
        for src_at, dst_at in zip(_inclusive(pull.src_layers), _inclusive(pull.dst_layers), strict=True):
            source = _memory(src_spec, src_at)
            target, writes = _memory(dst_spec, dst_at), self.writes[dst_spec.addrs[dst_at]]
            for src_block, dst_block in zip(pull.src_blocks, pull.dst_blocks, strict=True):
                from_, to = int(src_block) * granule, int(dst_block) * granule
                assert 0 <= from_ <= len(source) - granule
                assert 0 <= to <= len(target) - granule
                target[to : to + granule] = source[from_ : from_ + granule]
                writes[to : to + granule] += 1


def _inclusive(layers: tuple[int, int]) -> range:
    return range(layers[0], layers[1] + 1)


def _length(spec: CacheSpec) -> int:
    return (spec.layout.num_blocks - 1) * spec.layout.block_stride + spec.layout.block_bytes


def _memory(spec: CacheSpec, tensor: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    length = _length(spec)
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(spec.addrs[tensor]))
